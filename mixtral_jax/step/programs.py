"""The programs of one step, a program for each layer: the form for CPU.

It is a few programs: `embed`, `block` (called once for each layer), `pick` and `draw`. Where
some row has an adapter, `adapted_block` is called in place of `block`, and where one has a mask,
`draw_masked` in place of `draw`; all other steps run what they would run if there were neither. All
layers of one form have the same shapes, so one compilation serves them all and the start does not
grow with the depth. What a sequence drew goes from `draw` to the next `embed` on the device, so a
step can be launched before the tokens of the previous one are read. Where fewer rows draw than a
step has room for, as at the end of a prompt, `pick` and `draw` of fewer rows are called; where none
does, no `draw`.

Where experts are counted, `block` and `adapted_block` also return how many tokens chose each of
them, and `tally` puts the counts of all layers together.

Launching some 35 programs costs the host 0.5 ms, and under a mesh of eight 2.8 ms, which a CPU does
not notice beside its step; accelerators have one program for all of it (whole_step.py).

Only shapes are needed: the same programs are compiled for devices that are not there
(mixtral_jax/planning).
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.stages import Compiled

from mixtral_jax.axes import PagePairs, Pages
from mixtral_jax.model.adapter_stack import Adapters, BlockStacks
from mixtral_jax.step.functions import StepFunctions, copied
from mixtral_jax.step.inputs import StepInputs, mask_words
from mixtral_jax.step.split_model import REPLICATED, SplitModel


class Ends(NamedTuple):
    """The compiled programs behind the layers, for some number of rows."""

    pick: Compiled  # (x, tokens, last) -> x and tokens of the rows that draw
    draw: Compiled  # (rest, x, last tokens, sampling) -> Sampled
    draw_masked: Compiled | None  # (rest, x, last tokens, sampling, allowed) -> Sampled


class Programs(NamedTuple):
    """The compiled programs of a step of one size."""

    embed: Compiled  # (rest, batch, follows, tokens) -> batch with its tokens, x, rotary
    # For each form of layer: (block, x, rotary, pages, batch) -> x, pages; pages are donated
    blocks: tuple[Compiled, ...]
    forms: tuple[int, ...]  # of each layer, an index of `blocks`
    pick: Compiled  # these three as in Ends, for as many rows as the step has room for
    draw: Compiled
    draw_masked: Compiled | None
    # (block, x, rotary, pages, batch, adapters) -> x, pages; empty if no row has an adapter
    adapted_blocks: tuple[Compiled, ...] = ()
    # Where experts are counted, both blocks have a third result, which `compile_tally` takes.
    # By rows, where fewer draw: a product with the whole vocabulary is not made for empty rows.
    fewer: Mapping[int, Ends] = {}

    def ends(self, rows: int) -> Ends:
        """Returns the programs behind the layers for inputs of so many rows."""
        return self.fewer.get(rows) or Ends(self.pick, self.draw, self.draw_masked)

    @property
    def all(self) -> list[Compiled | None]:
        """All of them; None for those that no step needs."""
        own = [self.embed, *self.blocks, self.pick, self.draw, self.draw_masked]
        ends = [program for ends in self.fewer.values() for program in ends]
        return [*own, *self.adapted_blocks, *ends]


def compile_walk(
    split: SplitModel,
    pages: jax.ShapeDtypeStruct,
    inputs: StepInputs,
    num_drawn: int,
    stacks: BlockStacks | None = None,
    *,
    counts_experts: bool = False,
) -> tuple[Compiled, tuple[Compiled, ...], Compiled, tuple[Compiled, ...]]:
    """Compiles `embed`, `blocks`, `pick` and `adapted_blocks` for the shapes of these inputs.

    `num_drawn` is the length of `Sampled.tokens`. `stacks` are shapes; without them there are no
    `adapted_blocks`. With `counts_experts` both blocks also return `expert_tokens` of each group.
    """

    step = StepFunctions(split, num_drawn, counts_experts)
    rows, places = split.spec("B"), split.spec("PYKH")
    embedding = split.jit(
        step.embed,
        (split.rest_structure.specs, REPLICATED, REPLICATED, REPLICATED),
        (rows, rows, rows),
    )
    drawn = jax.ShapeDtypeStruct((num_drawn,), jnp.int32)
    given = (split.rest, inputs.batch, inputs.follows, drawn)
    batch, x, rotary = jax.eval_shape(embedding, *given)
    out = (rows, places, rows) if counts_experts else (rows, places)
    blocks, adapted = [], []
    for form, structure in enumerate(split.block_structures):
        run = partial(step.block, form)
        specs = (structure.specs, rows, rows, places, rows)
        walked = (split.blocks[split.forms.index(form)], x, rotary, pages, batch)
        blocks.append(split.jit(run, specs, out, donate=(3,)).lower(*walked).compile())
        if stacks is not None:
            slots = jax.ShapeDtypeStruct(inputs.slots.shape, jnp.int32)
            beside = Adapters(split.stack_specs(stacks), REPLICATED)  # type: ignore[arg-type]
            with_adapters = split.jit(run, (*specs, beside), out, donate=(3,))
            lowered = with_adapters.lower(*walked, Adapters(stacks, slots))  # type: ignore[arg-type]
            adapted.append(lowered.compile())
    return (
        embedding.lower(*given).compile(),
        tuple(blocks),
        compile_pick(split, inputs),
        tuple(adapted),
    )


def compile_pick(split: SplitModel, inputs: StepInputs) -> Compiled:
    """Compiles `pick` for the shapes of these inputs."""
    rows, tokens = split.spec("B"), jax.ShapeDtypeStruct(inputs.follows.shape, jnp.int32)
    x = jax.ShapeDtypeStruct((*tokens.shape, split.config.hidden_size), split.dtype)
    last = jax.ShapeDtypeStruct(inputs.last.shape, jnp.int32)
    pick = StepFunctions(split, num_drawn=0).pick
    picking = split.jit(pick, (rows, rows, REPLICATED), (REPLICATED, REPLICATED))
    return picking.lower(x, tokens, last).compile()


def compile_draw(
    split: SplitModel, inputs: StepInputs, num_drawn: int, *, has_masks: bool = True
) -> tuple[Compiled, Compiled | None]:
    """Compiles `draw` and `draw_masked` for as many rows as these inputs have.

    Without `has_masks` the second is None: it takes as long to compile as the first.
    """

    step = StepFunctions(split, num_drawn)
    x = jax.ShapeDtypeStruct((len(inputs.last), split.config.hidden_size), split.dtype)
    specs = (split.rest_structure.specs, REPLICATED, REPLICATED, REPLICATED)
    last = jax.ShapeDtypeStruct(inputs.last.shape, jnp.int32)
    words = mask_words(split.config.vocab_size)
    allowed = jax.ShapeDtypeStruct((len(inputs.last), words), jnp.int32)
    given = (split.rest, x, last, inputs.sampling)
    plain = split.jit(step.draw, specs, REPLICATED).lower(*given).compile()
    if not has_masks:
        return plain, None
    masked = split.jit(step.draw, (*specs, REPLICATED), REPLICATED)
    return plain, masked.lower(*given, allowed).compile()


def compile_copy(split: SplitModel, pages: jax.ShapeDtypeStruct, max_sequences: int) -> Compiled:
    """Compiles (pages, pairs [S 2]) -> pages: copies whole pages within each group."""

    def copy(pages: Pages, pairs: PagePairs) -> Pages:
        return copied(pages, pairs, split.layout)

    places = split.spec("PYKH")
    program = split.jit(copy, (places, REPLICATED), places, donate=(0,))
    pairs = jax.ShapeDtypeStruct((split.num_sequence_groups * max_sequences, 2), jnp.int32)
    return program.lower(pages, pairs).compile()


def compile_empty(pages: jax.ShapeDtypeStruct) -> Compiled:
    """Compiles () -> pages: allocates one layer's pages, filled with zeros."""
    program = jax.jit(lambda: jnp.zeros(pages.shape, pages.dtype), out_shardings=pages.sharding)
    return program.lower().compile()


def compile_tally(split: SplitModel) -> Compiled:
    """Compiles (counts of each layer [groups*E]) -> [L E]: those of all groups, on every device."""
    shape = (split.num_sequence_groups * split.config.num_experts,)
    layers = tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for _ in split.blocks)
    tally = split.jit(StepFunctions(split, num_drawn=0).tally, (split.spec("B"),), REPLICATED)
    return tally.lower(layers).compile()
