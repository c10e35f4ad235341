"""The parts of one step as functions of arrays, from which both forms of a step are compiled.

    embed   the step's tokens -> x [T D]; a drawn token comes from the step before, on the device
    block   one layer: x and its pages -> the same
    pick    the rows of x that draw
    draw    the next token of each of them
    tally   the counts of all layers' experts together

Under a mesh they run inside a `shard_map` (split_model.py). The sequences may be split into groups,
each with a flat row and pages of its own; the arrays of the host hold the groups one behind the
other. Drawn tokens are known to every device.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

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
from mixtral_jax.model.adapter_stack import NO_ADAPTERS, Adapters
from mixtral_jax.model.capture import Capture
from mixtral_jax.model.layers import Rotary
from mixtral_jax.step.sampling import Sampled, SamplingArrays, sample
from mixtral_jax.step.split_model import Arrays, SplitModel


@dataclass(frozen=True, eq=False)  # jax.jit keeps its methods by identity
class StepFunctions:
    """The functions of one model's steps.

    Attributes:
        split: the model.
        num_drawn: length of `Sampled.tokens`, the same for steps of every size.
        counts_experts: whether `block` also counts the tokens that chose each expert.
    """

    split: SplitModel
    num_drawn: int
    counts_experts: bool = False

    def embed(
        self, rest: Arrays, batch: RaggedBatch, follows: jax.Array, drawn: jax.Array
    ) -> tuple[RaggedBatch, FlatHidden, Rotary]:
        """Returns the group's batch with its tokens, x [T D] and the rotation of its positions.

        `batch` and `follows` are those of all groups, `drawn` is the last step's `Sampled.tokens`.
        """
        split = self.split
        batch, follows = own_group((batch, follows), split.layout)
        tokens = jnp.where(follows >= 0, drawn[jnp.maximum(follows, 0)], batch.tokens)
        batch = batch._replace(tokens=tokens)
        return batch, *split.rest_structure.module(rest).begin(batch)

    def block(
        self,
        form: int,
        arrays: Arrays,
        x: FlatHidden,
        rotary: Rotary,
        pages: Pages,
        batch: RaggedBatch,
        adapters: Adapters = NO_ADAPTERS,
    ) -> tuple[jax.Array, ...]:
        """Returns x [T D] and the pages behind a layer, and with `counts_experts` its counts.

        `form` is the layer's, of `SplitModel.forms`.
        """
        split = self.split
        batch = with_scalar_counts(batch, split.layout)
        if adapters.slots is not None:
            adapters = adapters._replace(slots=own_group(adapters.slots, split.layout))
        capture = Capture({"router.choice"} if self.counts_experts else ())
        module = split.block_structures[form].module(arrays)
        x, pages = module.paged(x, rotary, pages, batch, adapters, capture)
        if not self.counts_experts:
            return x, pages
        choice = capture.values["router.choice"]
        return x, pages, expert_tokens(choice, batch, split.config.num_experts)

    def pick(
        self, x: FlatHidden, tokens: FlatTokens, last: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns x [R D] and the token [R] of each row's last place, with the rows of all groups.

        `last` are the places of all groups' rows, each in its group.
        """
        layout = self.split.layout
        last = own_group(last, layout)
        x, tokens = x[last], tokens[last]
        if layout is None:
            return x, tokens
        return layout.gather_dimension(x, "B", 0), layout.gather_dimension(tokens, "B", 0)

    def draw(
        self,
        rest: Arrays,
        x: DrawnHidden,
        last: Rows,
        sampling: SamplingArrays,
        allowed: RowMasks | None = None,
    ) -> Sampled:
        """Returns the draws of all rows; see `sample`."""
        split = self.split
        model = split.rest_structure.module(rest)
        sampling = sampling._replace(history=sampling.history._replace(last=last))
        sampled = sample(model.paged_logits(model.norm.paged(x)), sampling, allowed)
        # The same width for every bucket, because a step of any size may come next.
        tokens = sampled.tokens.reshape(split.num_sequence_groups, -1)
        short = self.num_drawn // split.num_sequence_groups - tokens.shape[1]
        return sampled._replace(tokens=jnp.pad(tokens, ((0, 0), (0, short))).reshape(-1))

    def tally(self, layers: tuple[jax.Array, ...]) -> LayerCounts:
        """Returns the counts of all groups, [L E], of each layer's [E]."""
        counts = jnp.stack(layers)
        axes = () if self.split.layout is None else self.split.layout.axes("B")
        return jax.lax.psum(counts, axes) if axes else counts


def expert_tokens(choice: Choice, batch: RaggedBatch, num_experts: int) -> ExpertCounts:
    """Counts the tokens of a step that chose each expert, without its padding: [T X] -> [E] i32."""
    is_used = jnp.arange(choice.shape[0]) < batch.query_starts[batch.num_sequences]
    is_chosen = jax.nn.one_hot(choice, num_experts, dtype=jnp.int32)
    return jnp.sum(jnp.where(is_used[:, None, None], is_chosen, 0), axis=(0, 1), dtype=jnp.int32)


def copied(pages: Pages, pairs: PagePairs, layout: Layout | None) -> Pages:
    """Copies whole pages within each group: pairs [S 2] of source and destination."""
    pairs = own_group(pairs, layout)
    # A destination out of range is dropped.
    return pages.at[pairs[:, 1]].set(pages[pairs[:, 0]], mode="drop")


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
