"""Attention of whole rows, block by block: no array of T x T scores, forward or backward.

A block of queries meets one block of keys after the other with a running softmax
(arXiv:2205.14135). Of the forward pass each query keeps its output and one number, the logarithm of
its sum of exponentials; the gradient computes the scores anew, block by block, from it. Blocks that
the causal mask or the window hides altogether are not computed.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mixtral_jax.axes import RowKeys, RowQueries, Segments
from mixtral_jax.kernels.xla import attention as dense
from mixtral_jax.layout import Layout

_BLOCK = 256
_UNSEEN = -1e30  # finite, so that what has seen nothing yet stays free of inf - inf


def full_attention(
    q: RowQueries,
    k: RowKeys,
    v: RowKeys,
    window: int | None,
    layout: Layout | None,
    segments: Segments | None = None,
    *,
    block: int = _BLOCK,
) -> RowQueries:
    """`xla.full_attention`, whose scores take T x T for every head; rows of one block go by it.

    q [B T N H], k and v [B T K H], segments [B T] -> [B T N H]. The compiler splits it over a mesh
    by itself.
    """
    length = q.shape[1]
    if length <= 2 * block:
        return dense.full_attention(q, k, v, window, layout, segments)
    short = -length % block
    ids = jnp.zeros(q.shape[:2], jnp.int32) if segments is None else segments.astype(jnp.int32)
    q, k, v, ids = (
        jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2)) for x in (q, k, v, ids)
    )
    shape = _Shape(window, block, segments is not None)
    return _attention(shape, q, k, v, ids)[:, :length]


class _Shape(NamedTuple):
    """Numbers that a program is compiled for: the window, the size of a block, the mask."""

    window: int | None
    block: int
    has_segments: bool

    def keys_of(self, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The blocks of keys, first and behind the last, that a block of queries sees."""
        oldest = 0 * queries
        if self.window is not None:
            oldest = jnp.maximum(queries * self.block - self.window + 1, 0) // self.block
        return oldest, queries + 1

    def queries_of(self, keys: jax.Array, blocks: int) -> tuple[jax.Array, jax.Array]:
        """The blocks of queries, first and behind the last, that see a block of keys."""
        last = 0 * keys + blocks
        if self.window is not None:
            newest = ((keys + 1) * self.block + self.window - 2) // self.block
            last = jnp.minimum(last, newest + 1)
        return keys, last

    def scores(
        self, q: jax.Array, k: jax.Array, ids: jax.Array, queries: jax.Array, keys: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Scores [B K G block block] f32 of a block of queries and one of keys; what is seen."""
        places = jnp.arange(self.block, dtype=jnp.int32)
        query, key = places[:, None] + queries * self.block, places[None, :] + keys * self.block
        seen = key <= query
        if self.window is not None:
            seen &= key > query - self.window
        seen = seen[None, None, None]
        if self.has_segments:
            of_query, of_key = (self.of(ids, block) for block in (queries, keys))
            seen &= (of_query[:, :, None] == of_key[:, None, :])[:, None, None]
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
        return scores * q.shape[-1] ** -0.5, seen

    def of(self, x: jax.Array, number: jax.Array) -> jax.Array:
        """One block of an array [B T ...]."""
        return jax.lax.dynamic_slice_in_dim(x, number * self.block, self.block, axis=1)

    def put(self, x: jax.Array, block: jax.Array, number: jax.Array) -> jax.Array:
        """The array [B T ...] with another block."""
        return jax.lax.dynamic_update_slice_in_dim(x, block, number * self.block, axis=1)


def _zeros_after(x: jax.Array, *arrays: tuple[tuple[int, ...], DTypeLike]) -> list[jax.Array]:
    """Zeros of these shapes and dtypes, which the compiler cannot make before `x` is there.

    Loops fill them. Of plain zeros, and of the results that `lax.scan` stacks, it makes those of
    all layers at the start of the step, where they take room that the step needs later.
    """
    zero, _ = jax.lax.optimization_barrier((jnp.zeros((), jnp.float32), x))
    return [jnp.broadcast_to(zero.astype(dtype), shape) for shape, dtype in arrays]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    shape: _Shape, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array
) -> jax.Array:
    return _attention_forward(shape, q, k, v, ids)[0]


# q, k, v, ids; the output, and of each query the logarithm of its sum of exponentials [B T K G]
_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def _attention_forward(
    shape: _Shape, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array
) -> tuple[jax.Array, _Residuals]:
    rows, length, heads, size = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(rows, length, kv_heads, heads // kv_heads, size)
    groups = (rows, kv_heads, heads // kv_heads, shape.block)

    def of_queries(
        number: jax.Array, made: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        queries = shape.of(grouped, number)

        def step(
            i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            peak, total, mixed = state
            scores, seen = shape.scores(queries, shape.of(k, i), ids, number, i)
            scores = jnp.where(seen, scores, _UNSEEN)
            highest = jnp.maximum(peak, jnp.max(scores, axis=-1))
            weights = jnp.where(seen, jnp.exp(scores - highest[..., None]), 0)
            shrink = jnp.exp(peak - highest)
            values = shape.of(v, i)
            added = jnp.einsum(
                "BKGTS,BSKH->BKGTH",
                weights.astype(values.dtype),
                values,
                preferred_element_type=jnp.float32,
            )
            total = total * shrink + jnp.sum(weights, axis=-1)
            return highest, total, mixed * shrink[..., None] + added

        start = (
            jnp.full(groups, _UNSEEN, jnp.float32),
            jnp.zeros(groups, jnp.float32),
            jnp.zeros((*groups, size), jnp.float32),
        )
        peak, total, mixed = jax.lax.fori_loop(*shape.keys_of(number), step, start)
        out, logs = made
        # [B K G block H] -> [B block K G H]
        done = jnp.transpose(mixed / total[..., None], (0, 3, 1, 2, 4)).astype(q.dtype)
        log = jnp.transpose(peak + jnp.log(total), (0, 3, 1, 2))
        return shape.put(out, done, number), shape.put(logs, log, number)

    start = _zeros_after(q, (grouped.shape, q.dtype), (grouped.shape[:-1], jnp.float32))
    out, logs = jax.lax.fori_loop(0, length // shape.block, of_queries, (start[0], start[1]))
    out = out.reshape(q.shape)
    return out, (q, k, v, ids, out, logs)


def _attention_backward(
    shape: _Shape, residuals: _Residuals, slope: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, ids, out, logs = residuals
    rows, length, heads, size = q.shape
    kv_heads, blocks = k.shape[2], length // shape.block
    wide = (rows, length, kv_heads, heads // kv_heads)
    grouped, slopes = q.reshape(*wide, size), slope.reshape(*wide, size)
    # The sum of slope x output of each query, which the softmax takes off every score's slope.
    off = jnp.sum(slopes.astype(jnp.float32) * out.reshape(slopes.shape), axis=-1)
    scale = size**-0.5

    def of_keys(
        number: jax.Array, made: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys, values = shape.of(k, number), shape.of(v, number)

        def step(
            i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            dq, dk, dv = state
            queries, d_out = shape.of(grouped, i), shape.of(slopes, i)
            scores, seen = shape.scores(queries, keys, ids, i, number)
            log = jnp.transpose(shape.of(logs, i), (0, 2, 3, 1))
            weights = jnp.where(seen, jnp.exp(scores - log[..., None]), 0)
            product = partial(jnp.einsum, preferred_element_type=jnp.float32)
            dv += product("BKGTS,BTKGH->BSKH", weights.astype(q.dtype), d_out)
            d_weights = product("BTKGH,BSKH->BKGTS", d_out, values)
            behind = jnp.transpose(shape.of(off, i), (0, 2, 3, 1))[..., None]
            d_scores = (weights * (d_weights - behind) * scale).astype(q.dtype)
            dk += product("BKGTS,BTKGH->BSKH", d_scores, queries)
            added = product("BKGTS,BSKH->BTKGH", d_scores, keys)
            return shape.put(dq, shape.of(dq, i) + added, i), dk, dv

        dq, dk, dv = made
        zeros = jnp.zeros(keys.shape, jnp.float32)
        first, last = shape.queries_of(number, blocks)
        dq, own_dk, own_dv = jax.lax.fori_loop(first, last, step, (dq, zeros, zeros))
        dk = shape.put(dk, own_dk.astype(k.dtype), number)
        return dq, dk, shape.put(dv, own_dv.astype(v.dtype), number)

    arrays = ((grouped.shape, jnp.float32), (k.shape, k.dtype), (v.shape, v.dtype))
    start = _zeros_after(slope, *arrays)
    dq, dk, dv = jax.lax.fori_loop(0, blocks, of_keys, (start[0], start[1], start[2]))
    return dq.reshape(q.shape).astype(q.dtype), dk, dv, None


_attention.defvjp(_attention_forward, _attention_backward)
