"""Logits to tokens, one row per sequence, all parameters as arrays.

The random number of a row depends on the row's seed and position alone, never on its neighbours,
so a request draws the same numbers whatever it is batched with.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.axes import FlatLogits, RowFloats, Rows


class SamplingArrays(NamedTuple):
    """Parameters of R rows."""

    temperature: RowFloats  # f32; 0 takes the likeliest token
    top_p: RowFloats  # f32 in (0, 1]
    seed: Rows  # i32
    position: Rows  # i32, of the token to be drawn, in its sequence


def sample(logits: FlatLogits, params: SamplingArrays) -> Rows:
    """Draws a token for each row: logits [R V] f32 -> ids [R] i32.

    The work that no row asked for is skipped: ordering a vocabulary costs more than a small model.
    """
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(logits: jax.Array) -> jax.Array:
        scaled = logits / jnp.maximum(params.temperature, 1e-6)[:, None]
        kept = jax.lax.cond(jnp.any(params.top_p < 1), _nucleus, _everything, scaled, params.top_p)
        drawn = jnp.argmax(kept + _noise(params, logits.shape[-1]), axis=-1)
        return jnp.where(params.temperature > 0, drawn.astype(jnp.int32), likeliest)

    return jax.lax.cond(jnp.any(params.temperature > 0), draw, lambda _: likeliest, logits)


def _noise(params: SamplingArrays, vocab_size: int) -> jax.Array:
    """Gumbel noise [R V]: the argmax of logits + noise is a draw from their softmax."""

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(row)(params.seed, params.position)


def _everything(scaled: jax.Array, top_p: jax.Array) -> jax.Array:
    return scaled


def _nucleus(scaled: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keeps the likeliest tokens that together reach top_p (arXiv:1904.09751), at least one."""
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    count = jnp.sum(before < top_p[:, None], axis=-1, keepdims=True)
    least = jnp.take_along_axis(ordered, jnp.maximum(count - 1, 0), axis=-1)
    return jnp.where(scaled >= least, scaled, -jnp.inf)
