"""The programs of one step, compiled for shapes.

A step is a few programs: `embed`, `block` (called once for each layer), `pick` and `draw`. Where
some row has an adapter, `adapted_block` is called in place of `block`, and where one has a mask,
`draw_masked` in place of `draw`; all other steps run what they would run if there were neither. All
layers have the same shapes, so one compilation serves them all and the start does not grow with the
depth. What a sequence drew goes from `draw` to the next `embed` on the device, so a step can be
launched before the tokens of the previous one are read.

Where experts are counted, `block` and `adapted_block` also return how many tokens chose each of
them, and `tally` puts the counts of all layers together.

Under a mesh (split_model.py) the sequences may be split into groups, each with a flat row and pages
of its own; the arrays on the host hold the groups one behind the other. Drawn tokens are known to
every device.

Only shapes are needed: the same programs are compiled for devices that are not there
(mixtral_jax/planning).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Compiled

from mixtral_jax.axes import (
    Choice,
    DrawnHidden,
    ExpertCounts,
    FlatHidden,
    FlatTokens,
    LayerCounts,
    PagePairs,
    Pages,
    RowMasks,
    Rows,
)
from mixtral_jax.cache import RaggedBatch
from mixtral_jax.layout import Layout
from mixtral_jax.model.adapter_stack import NO_ADAPTERS, Adapters, BlockStacks
from mixtral_jax.model.capture import Capture
from mixtral_jax.model.layers import Rotary
from mixtral_jax.step.inputs import StepInputs, mask_words
from mixtral_jax.step.sampling import Sampled, SamplingArrays, sample
from mixtral_jax.step.split_model import REPLICATED, Arrays, SplitModel


@dataclass(frozen=True)
class Programs:
    """The compiled programs of a step of one size."""

    embed: Compiled  # (rest, batch, follows, tokens) -> batch with its tokens, x, rotary
    block: Compiled  # (block, x, rotary, pages, batch) -> x, pages; pages are donated
    pick: Compiled  # (x, tokens, last) -> x and tokens of the rows that draw
    draw: Compiled  # (rest, x, last tokens, sampling) -> Sampled
    draw_masked: Compiled | None  # (rest, x, last tokens, sampling, allowed) -> Sampled
    # (block, x, rotary, pages, batch, adapters) -> x, pages; None if no row has an adapter
    adapted_block: Compiled | None = None
    # Where experts are counted, both blocks have a third result, which `compile_tally` takes.


def compile_walk(
    split: SplitModel,
    pages: jax.ShapeDtypeStruct,
    inputs: StepInputs,
    num_drawn: int,
    stacks: BlockStacks | None = None,
    *,
    counts_experts: bool = False,
) -> tuple[Compiled, Compiled, Compiled, Compiled | None]:
    """Compiles `embed`, `block`, `pick` and `adapted_block` for the shapes of these inputs.

    `num_drawn` is the length of `Sampled.tokens`. `stacks` are shapes; without them there is no
    `adapted_block`. With `counts_experts` both blocks also return `expert_tokens` of each group.
    """

    def embed(
        rest: Arrays, batch: RaggedBatch, follows: jax.Array, drawn: Rows
    ) -> tuple[RaggedBatch, FlatHidden, Rotary]:
        batch, follows = own_group((batch, follows), split.layout)
        tokens = jnp.where(follows >= 0, drawn[jnp.maximum(follows, 0)], batch.tokens)
        batch = batch._replace(tokens=tokens)
        return batch, *split.rest_structure.module(rest).begin(batch)

    def block(
        arrays: Arrays,
        x: FlatHidden,
        rotary: Rotary,
        pages: Pages,
        batch: RaggedBatch,
        adapters: Adapters = NO_ADAPTERS,
    ) -> tuple[jax.Array, ...]:
        batch = with_scalar_counts(batch, split.layout)
        if adapters.slots is not None:
            adapters = adapters._replace(slots=own_group(adapters.slots, split.layout))
        capture = Capture({"router.choice"} if counts_experts else ())
        module = split.block_structure.module(arrays)
        x, pages = module.paged(x, rotary, pages, batch, adapters, capture)
        if not counts_experts:
            return x, pages
        choice = capture.values["router.choice"]
        return x, pages, expert_tokens(choice, batch, split.config.num_experts)

    def pick(x: FlatHidden, tokens: FlatTokens, last: Rows) -> tuple[DrawnHidden, Rows]:
        last = own_group(last, split.layout)
        x, tokens = x[last], tokens[last]
        if split.layout is None:
            return x, tokens
        return split.layout.gather_dimension(x, "B", 0), split.layout.gather_dimension(
            tokens, "B", 0
        )

    rows, places = split.spec("B"), split.spec("PYKH")
    embedding = split.jit(
        embed,
        (split.rest_structure.specs, REPLICATED, REPLICATED, REPLICATED),
        (rows, rows, rows),
    )
    drawn = jax.ShapeDtypeStruct((num_drawn,), jnp.int32)
    given = (split.rest, inputs.batch, inputs.follows, drawn)
    batch, x, rotary = jax.eval_shape(embedding, *given)
    specs = (split.block_structure.specs, rows, rows, places, rows)
    out = (rows, places, rows) if counts_experts else (rows, places)
    walk = split.jit(block, specs, out, donate=(3,))
    walked = (split.blocks[0], x, rotary, pages, batch)
    adapted: Compiled | None = None
    if stacks is not None:
        slots = jax.ShapeDtypeStruct(inputs.slots.shape, jnp.int32)
        beside = Adapters(split.stack_specs(stacks), REPLICATED)  # type: ignore[arg-type]
        with_adapters = split.jit(block, (*specs, beside), out, donate=(3,))
        adapted = with_adapters.lower(*walked, Adapters(stacks, slots)).compile()  # type: ignore[arg-type]
    picking = split.jit(pick, (rows, rows, REPLICATED), (REPLICATED, REPLICATED))
    return (
        embedding.lower(*given).compile(),
        walk.lower(*walked).compile(),
        picking.lower(x, batch.tokens, inputs.last).compile(),
        adapted,
    )


def compile_draw(
    split: SplitModel, inputs: StepInputs, num_drawn: int, *, has_masks: bool = True
) -> tuple[Compiled, Compiled | None]:
    """Compiles `draw` and `draw_masked` for as many rows as these inputs have.

    Without `has_masks` the second is None: it takes as long to compile as the first.
    """

    def draw(
        rest: Arrays,
        x: DrawnHidden,
        last: Rows,
        sampling: SamplingArrays,
        allowed: RowMasks | None = None,
    ) -> Sampled:
        model = split.rest_structure.module(rest)
        sampling = sampling._replace(history=sampling.history._replace(last=last))
        sampled = sample(model.paged_logits(model.norm.paged(x)), sampling, allowed)
        # The same width for every bucket, because a step of any size may come next.
        tokens = sampled.tokens.reshape(split.num_sequence_groups, -1)
        short = num_drawn // split.num_sequence_groups - tokens.shape[1]
        return sampled._replace(tokens=jnp.pad(tokens, ((0, 0), (0, short))).reshape(-1))

    x = jax.ShapeDtypeStruct((len(inputs.last), split.config.hidden_size), split.dtype)
    specs = (split.rest_structure.specs, REPLICATED, REPLICATED, REPLICATED)
    last = jax.ShapeDtypeStruct(inputs.last.shape, jnp.int32)
    words = mask_words(split.config.vocab_size)
    allowed = jax.ShapeDtypeStruct((len(inputs.last), words), jnp.int32)
    given = (split.rest, x, last, inputs.sampling)
    plain = split.jit(draw, specs, REPLICATED).lower(*given).compile()
    if not has_masks:
        return plain, None
    masked = split.jit(draw, (*specs, REPLICATED), REPLICATED)
    return plain, masked.lower(*given, allowed).compile()


def compile_copy(split: SplitModel, pages: jax.ShapeDtypeStruct, max_sequences: int) -> Compiled:
    """Compiles (pages, pairs [S 2]) -> pages: copies whole pages within each group."""

    def copy(pages: Pages, pairs: PagePairs) -> Pages:
        pairs = own_group(pairs, split.layout)
        # A destination out of range is dropped.
        return pages.at[pairs[:, 1]].set(pages[pairs[:, 0]], mode="drop")

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

    def tally(layers: tuple[jax.Array, ...]) -> LayerCounts:
        counts = jnp.stack(layers)
        axes = () if split.layout is None else split.layout.axes("B")
        return jax.lax.psum(counts, axes) if axes else counts

    layers = tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for _ in split.blocks)
    return split.jit(tally, (split.spec("B"),), REPLICATED).lower(layers).compile()


def expert_tokens(choice: Choice, batch: RaggedBatch, num_experts: int) -> ExpertCounts:
    """Counts the tokens of a step that chose each expert, without its padding: [T X] -> [E] i32."""
    is_used = jnp.arange(choice.shape[0]) < batch.query_starts[batch.num_sequences]
    is_chosen = jax.nn.one_hot(choice, num_experts, dtype=jnp.int32)
    return jnp.sum(jnp.where(is_used[:, None, None], is_chosen, 0), axis=(0, 1), dtype=jnp.int32)


def own_group(arrays: Any, layout: Layout | None) -> Any:
    """Cuts this device's sequence group out of arrays that hold all groups.

    The host gives all groups to all devices, because with several processes JAX takes arrays of the
    host only as a whole.
    """
    if layout is None or layout.num_sequence_groups == 1:
        return arrays

    def cut(whole: jax.Array) -> jax.Array:
        size = whole.shape[0] // layout.num_sequence_groups
        return jax.lax.dynamic_slice_in_dim(whole, layout.part_index("B") * size, size)

    return jax.tree.map(cut, arrays)


def with_scalar_counts(batch: RaggedBatch, layout: Layout | None) -> RaggedBatch:
    """Returns one group's batch as the model takes it: with its two counts as scalars."""
    if layout is None:
        return batch
    decodes, sequences = batch.num_decodes[0], batch.num_sequences[0]
    return batch._replace(num_decodes=decodes, num_sequences=sequences)
