"""The programs that make and change the stacks of adapters; those of steps are in programs.py."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.stages import Compiled

from mixtral_jax.model.adapter import UNCHANGED
from mixtral_jax.model.adapter_stack import BlockStacks, StackSizes, slot_content
from mixtral_jax.step.split_model import REPLICATED, SplitModel


@dataclass(frozen=True, kw_only=True)
class AdapterPrograms:
    """The programs that make and change the stacks of adapters."""

    sizes: StackSizes
    empty: Compiled  # () -> stacks of one layer
    put: Compiled  # (stacks, slot, content) -> stacks

    @classmethod
    def compile(
        cls, split: SplitModel, stacks: BlockStacks, sizes: StackSizes
    ) -> "AdapterPrograms":
        """Compiles them for a model; `stacks` are shapes of these sizes."""
        return cls(
            sizes=sizes,
            empty=_compile_empty(stacks),
            put=_compile_put(split, stacks, sizes),
        )


def _compile_put(split: SplitModel, stacks: BlockStacks, sizes: StackSizes) -> Compiled:
    """Compiles (stacks, slot, content) -> stacks: writes an adapter's layer into its slot.

    The slot is an argument, and `content` is as `slot_content` makes it: nothing is compiled
    when an adapter comes. The old stacks are not donated, because steps that were launched read
    them, and because a load that fails leaves them as they were.
    """

    def put(stacks: BlockStacks, slot: jax.Array, content: BlockStacks) -> BlockStacks:
        return stacks.with_slot(slot, content, split.config)

    blank = slot_content(UNCHANGED, split.config, split.placement, sizes)
    slot = jax.ShapeDtypeStruct((), jnp.int32)
    if split.layout is None:
        return jax.jit(put).lower(stacks, slot, blank).compile()
    whole = NamedSharding(split.layout.mesh, REPLICATED)
    shardings = jax.tree.map(lambda stack: stack.sharding, stacks)
    program = jax.jit(put, in_shardings=(shardings, whole, whole), out_shardings=shardings)
    return program.lower(stacks, slot, blank).compile()


def _compile_empty(stacks: BlockStacks) -> Compiled:
    """Compiles () -> stacks of one layer, all of whose slots are filled with zeros."""
    shardings = jax.tree.map(lambda stack: stack.sharding, stacks)

    def zeros() -> BlockStacks:
        made: BlockStacks = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stacks)
        return made

    return jax.jit(zeros, out_shardings=shardings).lower().compile()
