"""The decoder: Block and Transformer, with the full-sequence and the paged form.

No sampling, no requests, no globals. Parameters carry their axis letters (`axes="NHD"`), from
which ShardingRules makes shardings.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mixtral_jax.axes import (
    DrawnHidden,
    FlatHidden,
    FlatLogits,
    Hidden,
    Pages,
    RowHidden,
    RowLogits,
    Tokens,
)
from mixtral_jax.cache import PagedCache, RaggedBatch
from mixtral_jax.compilation import CompiledPrograms
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.attention import Attention
from mixtral_jax.model.layers import (
    Embedding,
    FeedForward,
    Linear,
    RMSNorm,
    Rotary,
    activation_dtype,
    products,
)
from mixtral_jax.model.moe import MoE
from mixtral_jax.sharding import Layout, ShardingRules


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: DTypeLike,
        activations: DTypeLike,
        rngs: nnx.Rngs | None,
        layout: Layout | None,
    ) -> None:
        self.attention_norm = RMSNorm(config, activations, rngs)
        self.attention = Attention(config, dtype, rngs, layout)
        self.feed_forward_norm = RMSNorm(config, activations, rngs)
        self.feed_forward = (
            MoE(config, dtype, activations, rngs, layout)
            if config.is_moe
            else FeedForward(config, dtype, rngs, layout)
        )

    def full(self, x: RowHidden, rotary: Rotary) -> RowHidden:
        x = x + self.attention.full(self.attention_norm.full(x), rotary)
        return x + self.feed_forward.full(self.feed_forward_norm.full(x))

    def paged(
        self, x: FlatHidden, rotary: Rotary, pages: Pages, batch: RaggedBatch
    ) -> tuple[FlatHidden, Pages]:
        mixed, pages = self.attention.paged(self.attention_norm.paged(x), rotary, pages, batch)
        x = x + mixed
        return x + self.feed_forward.paged(self.feed_forward_norm.paged(x)), pages


class Transformer(nnx.Module):
    """Mistral, Mixtral, or a Llama that computes the same.

    Args:
        config: shape and mathematics.
        dtype: of weights and activations, bfloat16 or float32; or int8 for W8A8 weights.
        activations: of what flows between int8 weights, and of cached keys and values; None for
            float32. Else it must be `dtype`.
        rngs: source of the random initial weights; None for an abstract model, whose parameters
            are ShapeDtypeStructs.
        mesh: where the model is split; None for one device.
        rules: how axis letters map to the mesh; None for `ShardingRules.of`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        activations: DTypeLike | None = None,
        rngs: nnx.Rngs | None,
        mesh: Mesh | None = None,
        rules: ShardingRules | None = None,
    ) -> None:
        self.layout = None
        if mesh is not None:
            self.layout = Layout(mesh, rules or ShardingRules.of(config, mesh))
            self.layout.rules.check(config, mesh)
        between = activation_dtype(dtype) if activations is None else activations
        self.config = config
        self.programs = CompiledPrograms()
        self.embed = Embedding(config, dtype, rngs, self.layout)
        self.layers = nnx.List(
            [Block(config, dtype, between, rngs, self.layout) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(config, between, rngs)
        self.head = None if config.tied_embeddings else Linear("V", "D", config, dtype, rngs)
        if self.layout is not None:
            for variable in named_parameters(self).values():
                variable.set_value(_placed(variable.get_value(), variable, self.layout))

    def __call__(self, tokens: Tokens) -> RowLogits:
        """Full sequence: ids [B T] -> logits [B T V], each position seeing those before it.

        Rows of different lengths are padded on the right; what stands there disturbs nothing.
        """
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        rotary = Rotary.at(positions, self.config)
        x = self.embed(tokens).astype(self.dtype)
        for block in self.layers:
            x = block.full(x, rotary)
        return self.logits(self.norm.full(x))

    def paged(self, batch: RaggedBatch, cache: PagedCache) -> tuple[FlatHidden, PagedCache]:
        """New tokens of many sequences against their pages: final hidden states [T D].

        Logits cost a product with the whole vocabulary: ask `logits` for the rows that need them.
        """
        x, rotary = self.begin(batch)
        layers = []
        for block, pages in zip(self.layers, cache.layers, strict=True):
            x, pages = block.paged(x, rotary, pages, batch)
            layers.append(pages)
        return self.norm.paged(x), PagedCache(tuple(layers))

    def begin(self, batch: RaggedBatch) -> tuple[FlatHidden, Rotary]:
        """What the first block takes. For callers that run the blocks one by one."""
        x = self.embed.paged(batch.tokens).astype(self.dtype)
        return x, Rotary.at(batch.positions, self.config)

    def apart(self) -> tuple[list["Block"], "Transformer"]:
        """The blocks, and a Transformer without any that shares the other parameters.

        All blocks have the same shapes, so a caller that runs them one by one compiles one of them.
        """
        rest: Transformer = nnx.merge(*nnx.split(self))
        rest.layers = nnx.List([])
        return list(self.layers), rest

    def logits(self, x: Hidden) -> jax.Array:
        """Hidden states [*R D] -> logits [*R V] f32."""
        flat = x.reshape(-1, x.shape[-1])
        scores = self._head.scaled.product(flat).astype(jnp.float32)
        return scores.reshape(*x.shape[:-1], -1)

    def paged_logits(self, x: DrawnHidden) -> FlatLogits:
        """The same for rows [R D] that every device has."""
        scores = products(x, self._head.scaled)[0].astype(jnp.float32)
        return scores if self.layout is None else self.layout.whole(scores, "V", 1)

    @property
    def dtype(self) -> Any:
        """Of activations and of cached keys and values."""
        return self.norm.weight.get_value().dtype

    @property
    def _head(self) -> Embedding | Linear:
        return self.embed if self.head is None else self.head


def held_bytes(model: Transformer) -> int:
    """What the parameters take on each device; the model may be abstract."""
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
    return {".".join(str(part) for part in path): variable for path, variable in flat}
