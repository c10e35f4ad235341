"""The decoder: Block and Transformer, with the full-sequence and the paged form.

No sampling, no requests, no globals. Parameters carry their axis letters (`axes="NHD"`), from
which ShardingRules makes shardings. Named scopes such as `embed`, `layers.3/attention/qkv` and
`head` name each part in compiled programs, and so in the profiler's traces.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax.axes import (
    DrawnHidden,
    FlatHidden,
    FlatLogits,
    Hidden,
    Pages,
    RowHidden,
    RowLogits,
    Segments,
    Tokens,
)
from mixtral_jax.cache import PagedCache, RaggedBatch
from mixtral_jax.compilation import CompiledPrograms
from mixtral_jax.config import ModelConfig
from mixtral_jax.layout import Layout
from mixtral_jax.model.adapter import UNCHANGED, Adapter, BlockAdapter
from mixtral_jax.model.adapter_stack import NO_ADAPTERS, Adapters
from mixtral_jax.model.attention import Attention
from mixtral_jax.model.capture import NOTHING, Capture
from mixtral_jax.model.inside import Inside, captures_for, inside_of
from mixtral_jax.model.layers import (
    Embedding,
    FeedForward,
    Linear,
    RMSNorm,
    Rotary,
    full_product,
)
from mixtral_jax.model.moe import MoE
from mixtral_jax.model.recomputation import Run, recomputed
from mixtral_jax.placement import Placement


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, placement: Placement, rngs: nnx.Rngs | None) -> None:
        self.attention_norm = RMSNorm(config, placement, rngs)
        self.attention = Attention(config, placement, rngs)
        self.feed_forward_norm = RMSNorm(config, placement, rngs)
        self.feed_forward = (
            MoE(config, placement, rngs) if config.is_moe else FeedForward(config, placement, rngs)
        )

    def full(
        self,
        x: RowHidden,
        rotary: Rotary,
        capture: Capture = NOTHING,
        *,
        segments: Segments | None = None,
        adapter: BlockAdapter = UNCHANGED,
    ) -> RowHidden:
        """Whole rows: x [B T D] -> [B T D]; `capture` records values on the way."""
        capture.record("block.in", x)
        with jax.named_scope("attention"):
            normed = self.attention_norm.full(x)
            x = x + self.attention.full(normed, rotary, capture, segments=segments, adapter=adapter)
        with jax.named_scope("feed_forward"):
            normed = self.feed_forward_norm.full(x)
            x = x + self.feed_forward.full(normed, capture=capture, adapter=adapter)
        capture.record("block.out", x)
        return x

    def paged(
        self,
        x: FlatHidden,
        rotary: Rotary,
        pages: Pages,
        batch: RaggedBatch,
        adapters: Adapters = NO_ADAPTERS,
        capture: Capture = NOTHING,
    ) -> tuple[FlatHidden, Pages]:
        """New tokens against this layer's pages: x [T D] -> [T D] and the pages.

        `capture` records the experts that they chose.
        """
        with jax.named_scope("attention"):
            normed = self.attention_norm.paged(x)
            mixed, pages = self.attention.paged(normed, rotary, pages, batch, adapters)
            x = x + mixed
        with jax.named_scope("feed_forward"):
            normed = self.feed_forward_norm.paged(x)
            return x + self.feed_forward.paged(normed, adapters, capture, batch.num_tokens), pages


class Transformer(nnx.Module):
    """Mistral, Mixtral, or a Llama that computes the same.

    Args:
        config: shape and mathematics.
        placement: devices, dtypes and kernels; `Placement.of(config, ...)` makes it.
        rngs: source of the random initial weights; None for an abstract model, whose parameters
            are ShapeDtypeStructs.
    """

    def __init__(self, config: ModelConfig, placement: Placement, *, rngs: nnx.Rngs | None) -> None:
        self.config, self.placement = config, placement
        self.programs = CompiledPrograms()
        self.embed = Embedding(config, placement, rngs)
        self.layers = nnx.List(
            [Block(config, placement.of_layer(i), rngs) for i in range(config.num_layers)]
        )
        self.norm = RMSNorm(config, placement, rngs)
        self.head = (
            None
            if config.tied_embeddings
            else Linear("V", "D", config, placement, rngs, placement.table_dtype)
        )
        if self.layout is not None:
            for variable in named_parameters(self).values():
                variable.set_value(_placed(variable.get_value(), variable, self.layout))

    @overload
    def __call__(self, tokens: Tokens, adapter: Adapter | None = None) -> RowLogits: ...

    @overload
    def __call__(
        self, tokens: Tokens, adapter: Adapter | None = None, *, capture: Collection[str]
    ) -> tuple[RowLogits, Inside]: ...

    def __call__(
        self,
        tokens: Tokens,
        adapter: Adapter | None = None,
        *,
        capture: Collection[str] | None = None,
    ) -> RowLogits | tuple[RowLogits, Inside]:
        """Full sequence: ids [B T] -> logits [B T V], each position seeing those before it.

        Rows of different lengths are padded on the right; what stands there disturbs nothing. An
        adapter must have its scaling folded in (`Adapter.folded`). With `capture`, names such as
        "routing" and "attention.3" (model/inside.py), gives what it recorded beside the logits.
        Raises ValueError for an array of another rank or dtype, without tokens, or names it does
        not know.
        """
        shape = getattr(tokens, "shape", None)
        if shape is None or len(shape) != 2 or 0 in shape:
            given = f"a {type(tokens).__name__}" if shape is None else f"of the shape {[*shape]}"
            raise ValueError(
                f"the tokens are {given}; give an array [B T] of at least one row and one token, "
                "such as jax.numpy.array([ids])"
            )
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"the tokens are of {tokens.dtype}; give ids, which are whole numbers")
        if capture is None:
            return self.logits(self.hidden(tokens, adapter=adapter))
        captures = captures_for(capture, len(self.layers), self.config.is_moe)
        logits = self.logits(self.hidden(tokens, adapter=adapter, captures=captures))
        return logits, inside_of(captures, tokens.shape, self.config.sliding_window)

    def hidden(
        self,
        tokens: Tokens,
        *,
        segments: Segments | None = None,
        adapter: Adapter | None = None,
        captures: Sequence[Capture] | None = None,
        is_recomputed: bool = False,
    ) -> RowHidden:
        """The final hidden states of whole rows, whose `logits` are the model's: [B T] -> [B T D].

        Args:
            tokens: ids [B T].
            segments: of rows that hold several documents one behind the other, the number of each
                position's document; a document sees only itself, from position 0.
            adapter: with its scaling folded in (`Adapter.folded`).
            captures: one for each layer, which record values on the way.
            is_recomputed: a gradient recomputes each layer instead of keeping what is inside.
        """
        if segments is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        else:
            positions = positions_in(segments)
        rotary = Rotary.at(positions, self.config)
        with jax.named_scope("embed"):
            x = self.embed.full(tokens).astype(self.dtype)
        adapters = (UNCHANGED,) * len(self.layers) if adapter is None else adapter.layers
        for i, (block, beside) in enumerate(zip(self.layers, adapters, strict=True)):
            names = frozenset[str]() if captures is None else captures[i].names
            with jax.named_scope(f"layers.{i}"):
                if is_recomputed:
                    after = self.placement.full_kernels.after
                    run, state = _apart_from_arrays(block, names)
                    x, values = recomputed(run, after, x, beside, state, rotary, segments)
                else:
                    capture = Capture(names)
                    x = block.full(x, rotary, capture, segments=segments, adapter=beside)
                    values = capture.values
            if captures is not None:
                captures[i].values.update(values)
        return self.norm.full(x)

    def paged(self, batch: RaggedBatch, cache: PagedCache) -> tuple[FlatHidden, PagedCache]:
        """New tokens of many sequences against their pages: final hidden states [T D].

        Logits cost a product with the whole vocabulary: ask `logits` for the rows that need them.
        """
        x, rotary = self.begin(batch)
        layers = []
        for i, (block, pages) in enumerate(zip(self.layers, cache.layers, strict=True)):
            with jax.named_scope(f"layers.{i}"):
                x, pages = block.paged(x, rotary, pages, batch)
            layers.append(pages)
        return self.norm.paged(x), PagedCache(tuple(layers))

    def begin(self, batch: RaggedBatch) -> tuple[FlatHidden, Rotary]:
        """Embeds a batch's tokens: the first block's input, and the rotation of its positions."""
        with jax.named_scope("embed"):
            x = self.embed.paged(batch.tokens).astype(self.dtype)
        return x, Rotary.at(batch.positions, self.config)

    def apart(self) -> tuple[list["Block"], "Transformer"]:
        """The blocks, and a Transformer without any that shares the other parameters.

        Blocks whose weights have the same dtypes have the same shapes, so a caller that runs them
        one by one compiles one of these.
        """
        rest: Transformer = nnx.merge(*nnx.split(self))
        rest.layers = nnx.List([])
        return list(self.layers), rest

    def logits(self, x: Hidden) -> jax.Array:
        """Hidden states [*R D] -> logits [*R V] f32."""
        flat = x.reshape(-1, x.shape[-1])
        with jax.named_scope("head"):
            scores = full_product(flat, self._head.flat_weight, self.placement.full_kernels)
        return scores.astype(jnp.float32).reshape(*x.shape[:-1], -1)

    def paged_logits(self, x: DrawnHidden) -> FlatLogits:
        """The same for rows [R D] that every device has, by the placement's kernel."""
        with jax.named_scope("head"):
            products = self.placement.kernels.linear(x, [self._head.flat_weight])
        scores = products[0].astype(jnp.float32)
        return scores if self.layout is None else self.layout.gather_dimension(scores, "V", 1)

    @property
    def layout(self) -> Layout | None:
        """The mesh and the rules on it; None for one device."""
        return self.placement.layout

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations and of cached keys and values."""
        return jnp.dtype(self.placement.activation_dtype)

    @property
    def _head(self) -> Embedding | Linear:
        return self.embed if self.head is None else self.head


def _apart_from_arrays(block: Block, names: frozenset[str]) -> tuple[Run, Any]:
    """A function of a block's input, adapter, arrays, rotation and segments; and its arrays."""
    graph, state = nnx.split(block)

    def run(
        x: RowHidden, beside: BlockAdapter, state: Any, rotary: Rotary, segments: Segments | None
    ) -> tuple[RowHidden, dict[str, jax.Array]]:
        capture, whole = Capture(names), nnx.merge(graph, state)
        x = whole.full(x, rotary, capture, segments=segments, adapter=beside)
        return x, capture.values

    return run, state


def positions_in(segments: Segments) -> Segments:
    """Positions within each segment [B T], for example 0 1 2 0 1 of the segments 1 1 1 2 2."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :]
    is_first = segments != jnp.roll(segments, 1, axis=1)
    return index - jax.lax.cummax(jnp.where(is_first, index, 0), axis=1)


def held_bytes(model: Transformer) -> int:
    """Bytes of the parameters on each device; the model may be abstract."""
    total = 0
    for variable in named_parameters(model).values():
        array = variable.get_value()
        shape = array.shape
        if model.layout is not None:
            shape = model.layout.sharding(variable.get_metadata("axes")).shard_shape(shape)
        total += math.prod(shape) * array.dtype.itemsize
    return total


def _placed(value: Any, variable: nnx.Variable, layout: Layout) -> Any:
    """The same value split over the mesh; of an abstract one, the shape with its sharding."""
    sharding = layout.sharding(variable.get_metadata("axes"))
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    whole = np.asarray(value)  # every process has the same
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def named_parameters(model: Transformer) -> dict[str, Any]:
    """Every nnx.Param of the model by its dotted name, e.g. `layers.0.attention.q.weight`.

    Its axis letters are `get_metadata("axes")`, its array `get_value()`.
    """
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable for path, variable in flat}
