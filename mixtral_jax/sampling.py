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
    """Keeps the likeliest tokens that together reach top_p (arXiv:1904.09751), at least one.

    Finds the largest probability at which the tokens from there up reach top_p, by bisection over
    the bits of a float, which order as the floats do: exact, and no vocabulary is sorted.
    """
    probability = jax.nn.softmax(scaled, axis=-1)
    bits = jax.lax.bitcast_convert_type(probability, jnp.int32)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        kept = jnp.where(bits >= middle[:, None], probability, 0.0)
        enough = jnp.sum(kept, axis=-1) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    start = (jnp.zeros_like(bits[:, 0]), jnp.max(bits, axis=-1))
    threshold, _ = jax.lax.fori_loop(0, 31, halve, start)
    threshold = jnp.where(top_p < 1, threshold, 0)
    return jnp.where(bits >= threshold[:, None], scaled, -jnp.inf)
