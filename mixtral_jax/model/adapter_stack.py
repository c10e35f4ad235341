"""Stacks: matrices of several adapters beside each weight; each row of a step uses one of them.

An adapter takes a slot of every stack. How many slots there are, their rank and the targets that
have stacks are fixed when programs are compiled; a slot's content is not, so that adapters come and
go without a compilation. An adapter of a smaller rank is padded with zeros, and one that leaves a
target alone has zeros there.

Under a mesh a stack is split as the weight beside it: what adapters add to a weight whose inputs
are split are parts of a sum, which is summed up with the weight's own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.axes import FlatTokens
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import AdapterError, ConfigError
from mixtral_jax.kernels import Kernels
from mixtral_jax.model.adapter import TARGETS, Adapter, BlockAdapter, LowRank, adapter_letters
from mixtral_jax.placement import Placement
from mixtral_jax.weight import Weight

NO_SLOT = -1  # of a row without an adapter


@dataclass(frozen=True, kw_only=True)
class StackSizes:
    """Numbers that fix the shapes of stacks.

    Args:
        slots: adapters that rows of one step may use.
        rank: the largest rank of an adapter.
        targets: names out of `TARGETS` of the weights that adapters may change.

    Raises ConfigError for targets that do not exist, and for numbers below 1.
    """

    slots: int
    rank: int
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.slots < 1 or self.rank < 1:
            raise ConfigError(
                f"{self.slots} adapters of a rank up to {self.rank}; give 1 or more of each"
            )
        if not self.targets or any(name not in TARGETS for name in self.targets):
            raise ConfigError(
                f"the targets of adapters are {', '.join(self.targets) or 'none'}; choose from "
                f"{', '.join(TARGETS)}"
            )
        object.__setattr__(self, "targets", tuple(n for n in TARGETS if n in self.targets))

    @classmethod
    def all_targets(cls, config: ModelConfig, slots: int, rank: int) -> "StackSizes":
        """Sizes by which an adapter may change every target that the model has."""
        targets = tuple(n for n in TARGETS if n != "router" or config.is_moe)
        return cls(slots=slots, rank=rank, targets=targets)

    @classmethod
    def of_adapter(cls, adapter: Adapter, config: ModelConfig) -> "StackSizes":
        """Sizes for one adapter alone. Raises AdapterError for one that is none of this model."""
        lows = list(adapter.pairs())
        if len(adapter.layers) != config.num_layers or not lows:
            raise AdapterError(
                f"the adapter has {len(adapter.layers)} layers and {len(lows)} pairs of matrices, "
                f"and the model has {config.num_layers} layers; load the adapter with "
                "load_adapter(folder, model)"
            )
        for layer, target, low in lows:
            axes = config.axis_sizes | {"U": low.b.shape[-1]}
            has_target = target != "router" or config.is_moe
            letters = adapter_letters(target, config) if has_target else ("", "")
            wanted = [tuple(axes[letter] for letter in own) for own in letters]
            if [low.a.shape, low.b.shape] != wanted:
                raise AdapterError(
                    f"layer {layer}, {target}: the adapter's matrices are {low.a.shape} and "
                    f"{low.b.shape}, which do not fit this model; it is an adapter of another one"
                )
        rank = max(low.b.shape[-1] for _, _, low in lows)
        return cls(slots=1, rank=rank, targets=tuple({target for _, target, _ in lows}))


class Stack(NamedTuple):
    """The matrices beside one weight: a [A U *I] and b [A U *O]; of experts, each with E first."""

    a: jax.Array
    b: jax.Array

    def flat(self, lead: int = 1) -> tuple[jax.Array, jax.Array]:
        """A [G U I] and B [G U O]: the first `lead` axes, and those behind U, each made one."""
        groups = math.prod(self.a.shape[:lead])
        rank = self.a.shape[lead]
        return self.a.reshape(groups, rank, -1), self.b.reshape(groups, rank, -1)


class BlockStacks(NamedTuple):
    """The stacks of one layer; None beside the weights that no adapter changes."""

    q: Stack | None = None
    k: Stack | None = None
    v: Stack | None = None
    o: Stack | None = None
    router: Stack | None = None
    gate: Stack | None = None
    up: Stack | None = None
    down: Stack | None = None

    @classmethod
    def abstract(
        cls, config: ModelConfig, placement: Placement, sizes: StackSizes
    ) -> "BlockStacks":
        """Shapes of the stacks of a layer, with their shardings; in the activations' dtype."""
        axes = config.axis_sizes | {"A": sizes.slots, "U": sizes.rank}
        layout = placement.layout

        def array(letters: str) -> Any:
            shape = tuple(axes[letter] for letter in letters)
            sharding = None if layout is None else layout.sharding(letters)
            return jax.ShapeDtypeStruct(shape, placement.activation_dtype, sharding=sharding)

        def stack(target: str) -> Stack:
            a, b = stack_letters(target, config)
            return Stack(array(a), array(b))

        return cls(**{target: stack(target) for target in sizes.targets})

    def specs(self, config: ModelConfig, placement: Placement) -> "BlockStacks":
        """The PartitionSpecs in place of the arrays, for a placement that has a mesh."""
        assert placement.layout is not None
        rule = placement.layout.rules.spec

        def spec(target: str, stack: Stack | None) -> Stack | None:
            a, b = stack_letters(target, config)
            return None if stack is None else Stack(rule(a), rule(b))  # type: ignore[arg-type]

        return BlockStacks(*map(spec, self._fields, self))

    def with_slot(
        self, slot: jax.Array, content: "BlockStacks", config: ModelConfig
    ) -> "BlockStacks":
        """The stacks with another content of one slot; `content` has the same axes without A."""

        def put(target: str, stack: Stack | None, new: Stack | None) -> Stack | None:
            if stack is None or new is None:
                return None
            axis = stack_letters(target, config)[0].index("A")
            return Stack(
                *(
                    jax.lax.dynamic_update_index_in_dim(old, values, slot, axis)
                    for old, values in zip(stack, new, strict=True)
                )
            )

        return BlockStacks(*map(put, self._fields, self, content))


class Adapters(NamedTuple):
    """The stacks of one block, and the slots that the rows of a step use."""

    stacks: BlockStacks
    slots: FlatTokens | None  # [T] i32; NO_SLOT for rows without an adapter; None if all are so


NO_ADAPTERS = Adapters(BlockStacks(), None)


class AdaptedWeight(NamedTuple):
    """A weight of experts [E O I], and the matrices beside it, if there are any."""

    weight: Weight
    low: LowRank | Stack | None = None


def stack_letters(target: str, config: ModelConfig) -> tuple[str, str]:
    """The letters of a target's stacked A and B, such as AUD and AUNH; EAUD and EAUF."""
    a, b = adapter_letters(target, config)
    lead = "E" if a.startswith("E") else ""
    a, b = a.removeprefix(lead), b.removeprefix(lead)
    return f"{lead}A{a}", f"{lead}AU{b.removesuffix('U')}"


def slot_content(
    block: BlockAdapter, config: ModelConfig, placement: Placement, sizes: StackSizes
) -> BlockStacks:
    """The content of an adapter's slot in one layer: host arrays padded to the stacks' rank.

    `block` has its scaling folded into B, and no target or rank beyond `sizes`.
    """
    whole = BlockStacks.abstract(config, placement, sizes)

    def content(target: str, stack: Stack | None, low: LowRank | None) -> Stack | None:
        if stack is None:
            assert low is None, f"there is no stack for {target}"
            return None
        lead = stack_letters(target, config)[0].index("A")

        def array(shape: tuple[int, ...], values: np.ndarray | None) -> Any:
            own = shape[:lead] + shape[lead + 1 :]
            made = np.zeros(own, jnp.dtype(placement.activation_dtype))
            if values is not None:
                made[(slice(None),) * lead + (slice(values.shape[lead]),)] = values
            return made

        a = None if low is None else np.asarray(low.a)
        b = None if low is None else np.moveaxis(np.asarray(low.b), -1, lead)
        return Stack(array(stack.a.shape, a), array(stack.b.shape, b))

    return BlockStacks(*map(content, whole._fields, whole, block))


def slot_bytes(config: ModelConfig, placement: Placement, sizes: StackSizes) -> int:
    """Bytes of one slot in all layers, on each device."""
    total = 0
    for array in jax.tree.leaves(BlockStacks.abstract(config, placement, sizes)):
        shape = array.shape
        if array.sharding is not None:
            shape = array.sharding.shard_shape(shape)
        total += math.prod(shape) * array.dtype.itemsize
    return config.num_layers * total // sizes.slots


def add_stacks(
    ys: Sequence[jax.Array],
    x: jax.Array,
    groups: jax.Array,
    stacks: Sequence[Stack | None],
    kernels: Kernels,
    lead: int = 1,
) -> list[jax.Array]:
    """Adds to the products ys [R O] of the rows x [R I] what the stack beside each weight gives.

    Args:
        ys: one for each weight; without a stack it stays as it is.
        x: the rows.
        groups: [R] i32, numbers of the matrices that each row uses; negative for none.
        stacks: beside each weight.
        kernels: of the placement.
        lead: number of the stacks' axes whose indices make the group's number.
    """
    added = [i for i, stack in enumerate(stacks) if stack is not None]
    if not added:
        return list(ys)
    lows = [stack.flat(lead) for stack in stacks if stack is not None]
    sums = kernels.add_low_rank([ys[i] for i in added], x, groups, lows)
    whole = list(ys)
    for i, y in zip(added, sums, strict=True):
        whole[i] = y
    return whole
