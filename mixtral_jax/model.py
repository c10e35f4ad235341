"""The decoder: Block and Transformer, with the full-sequence and the paged form.

No sampling, no requests, no globals. Parameters carry their axis letters (`axes="NHD"`), from
which ShardingRules makes shardings.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mixtral_jax.attention import Attention
from mixtral_jax.axes import FlatHidden, FlatLogits, Hidden, Pages, RowHidden, RowLogits, Tokens
from mixtral_jax.cache import PagedCache, RaggedBatch
from mixtral_jax.config import ModelConfig
from mixtral_jax.layers import (
    Embedding,
    FeedForward,
    Linear,
    RMSNorm,
    Rotary,
    activation_dtype,
    products,
)
from mixtral_jax.moe import MoE
from mixtral_jax.sharding import ShardingRules


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
        mesh: Mesh | None,
        rules: ShardingRules,
    ) -> None:
        self.attention_norm = RMSNorm(config, activation_dtype(dtype), rngs)
        self.attention = Attention(config, dtype, rngs)
        self.feed_forward_norm = RMSNorm(config, activation_dtype(dtype), rngs)
        self.feed_forward = (
            MoE(config, dtype, rngs, mesh, rules)
            if config.is_moe
            else FeedForward(config, dtype, rngs)
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
        dtype: of weights and activations, bfloat16 or float32; or int8 for W8A8 weights, between
            which float32 activations and cached keys and values flow.
        rngs: source of the random initial weights; None for an abstract model, whose parameters
            are ShapeDtypeStructs.
        mesh: where experts are split; None for one device.
        rules: how axis letters map to the mesh.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
        mesh: Mesh | None = None,
        rules: ShardingRules = ShardingRules(),
    ) -> None:
        if mesh is not None:
            rules.check(config, mesh)
        self.config = config
        self.embed = Embedding(config, dtype, rngs)
        self.layers = nnx.List(
            [Block(config, dtype, rngs, mesh, rules) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(config, activation_dtype(dtype), rngs)
        self.head = None if config.tied_embeddings else Linear("V", "D", config, dtype, rngs)

    def __call__(self, tokens: Tokens) -> RowLogits:
        """Full sequence: ids [B T] -> logits [B T V], each position seeing those before it.

        Rows of different lengths are padded on the right; what stands there disturbs nothing.
        """
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        rotary = Rotary.at(positions, self.config)
        x = self.embed(tokens)
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
        return self.embed(batch.tokens), Rotary.at(batch.positions, self.config)

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

    def paged_logits(self, x: FlatHidden) -> FlatLogits:
        """The same for rows [T D] of the paged form."""
        return products(x, self._head.scaled)[0].astype(jnp.float32)

    @property
    def dtype(self) -> Any:
        """Of activations and of cached keys and values."""
        return self.norm.weight.get_value().dtype

    @property
    def _head(self) -> Embedding | Linear:
        return self.embed if self.head is None else self.head


def named_parameters(model: Transformer) -> dict[str, Any]:
    """Every nnx.Param of the model by its dotted name, e.g. `layers.0.attention.q.weight`.

    Its axis letters are `get_metadata("axes")`, its array `get_value()`.
    """
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(str(part) for part in path): variable for path, variable in flat}
