"""Attention in XLA: the meaning of every other maker's attention.

The paged form walks over blocks of pages with a running softmax (arXiv:2205.14135), so its cost
follows the tokens that are present, not the width of the page table: decodes all at once, then
prompt chunks one by one. Scores are scaled in float32, whatever the dtype of the queries:
1/sqrt(128) is no bfloat16.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax import cache
from mixtral_jax.axes import FlatKeys, FlatQueries, Pages, RowKeys, RowQueries, Segments
from mixtral_jax.cache import RaggedBatch
from mixtral_jax.kernels.no_gradient import without_gradient
from mixtral_jax.layout import Layout

# Tokens per step of the walk over keys, and over the queries of one prompt chunk.
_KEY_BLOCK = 128
_QUERY_BLOCK = 64


def full_attention(
    q: RowQueries,
    k: RowKeys,
    v: RowKeys,
    window: int | None,
    layout: Layout | None,
    segments: Segments | None = None,
) -> RowQueries:
    """Causal attention within each row: q [B T N H], k and v [B T K H] -> [B T N H].

    A query at position p sees the positions max(0, p - window + 1) .. p, and of a packed row those
    of its own segment [B T] only. The compiler splits it over a mesh by itself, so `layout` changes
    nothing here.
    """
    # jax counts the keys before the query, Mistral's window includes the query itself.
    before = None if window is None else (window - 1, 0)
    same = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
    # jax promotes dtypes inside, which a caller's strict setting would refuse.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            q, k, v, mask=same, is_causal=True, local_window_size=before
        )


def attention_weights(q: RowQueries, k: RowKeys, window: int | None) -> jax.Array:
    """Weights of the keys in `full_attention`: [B N T T] f32, which sum to 1 for each query."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    keys = jnp.repeat(k, group, axis=2)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, keys, preferred_element_type=jnp.float32)
    query = jnp.arange(length, dtype=jnp.int32)[:, None]
    key = jnp.arange(length, dtype=jnp.int32)[None, :]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    scores = jnp.where(seen[None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def attend(
    q: FlatQueries,
    k: FlatKeys,
    v: FlatKeys,
    pages: Pages,
    batch: RaggedBatch,
    window: int | None,
) -> tuple[FlatQueries, Pages]:
    """Writes k and v [T K H] into the pages, then attends: q [T N H] -> [T N H] and the pages."""
    q, k, v = (without_gradient("paged attention (attend)", x) for x in (q, k, v))
    written = cache.write(pages, k, v, batch)
    return paged_attention(q, written, batch, window), written


class _Softmax(NamedTuple):
    """A softmax-weighted sum under way; R query rows."""

    peak: jax.Array  # [R K G] f32, largest score so far
    total: jax.Array  # [R K G] f32, sum of exp(score - peak)
    mixed: jax.Array  # [R K G H] f32, sum of exp(score - peak) * value

    @classmethod
    def start(cls, rows: int, heads: tuple[int, int, int]) -> "_Softmax":
        groups = (rows, heads[0], heads[1])
        # Finite, so that a row that has seen nothing yet stays free of inf - inf.
        peak = jnp.full(groups, -1e30, jnp.float32)
        return cls(peak, jnp.zeros(groups), jnp.zeros((*groups, heads[2])))

    def add(self, scores: jax.Array, seen: jax.Array, weigh: str, v: jax.Array) -> "_Softmax":
        """Takes in a block of keys: scores [R K G S] f32, seen [R S], values for einsum `weigh`."""
        seen = seen[:, None, None, :]
        scores = jnp.where(seen, scores, -1e30)
        peak = jnp.maximum(self.peak, jnp.max(scores, axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - peak[..., None]), 0.0)
        shrink = jnp.exp(self.peak - peak)
        mixed = jnp.einsum(weigh, weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return _Softmax(
            peak,
            self.total * shrink + jnp.sum(weights, axis=-1),
            self.mixed * shrink[..., None] + mixed,
        )

    def finish(self) -> jax.Array:
        """[R N H]; rows that saw no key are zero."""
        mixed = self.mixed / jnp.maximum(self.total, 1e-30)[..., None]
        return mixed.reshape(mixed.shape[0], -1, mixed.shape[-1])


def paged_attention(
    q: FlatQueries,
    pages: Pages,
    batch: RaggedBatch,
    window: int | None,
) -> FlatQueries:
    """Attention of T new tokens over the pages of their sequences; q [T N H] -> [T N H].

    Query t at position p of its sequence sees the positions max(0, p - window + 1) .. p. Unused
    places of the batch give unspecified finite values.
    """
    num_tokens, num_heads, head_size = q.shape
    num_sequences = batch.lengths.shape[0]
    per_block = max(1, _KEY_BLOCK // pages.shape[1])
    # Whole blocks: a slice at the table's end must not be shifted back.
    short = -batch.page_table.shape[1] % per_block
    table = jnp.pad(batch.page_table, ((0, 0), (0, short)))
    query_block = min(_QUERY_BLOCK, num_tokens)
    room = max(num_tokens, num_sequences) + query_block
    q = jnp.pad(q, ((0, room - num_tokens), (0, 0), (0, 0)))
    attention = _PagedAttention(q, pages, batch, table, per_block, window)
    out = jnp.zeros((room, num_heads, head_size), jnp.float32)
    out = jax.lax.dynamic_update_slice(out, attention.decodes(num_sequences), (0, 0, 0))
    if num_tokens > 1:
        out = attention.chunks(out, query_block)
    return out[:num_tokens].astype(q.dtype)


class _PagedAttention(NamedTuple):
    """The arrays of one call of `paged_attention`, and its two loops over blocks of keys."""

    q: jax.Array  # [room N H]
    pages: jax.Array
    batch: RaggedBatch
    table: jax.Array  # [S W'], W' a multiple of per_block
    per_block: int
    window: int | None

    @property
    def block(self) -> int:
        return self.per_block * self.pages.shape[1]

    @property
    def heads(self) -> tuple[int, int, int]:
        """K, G, H."""
        kv_heads = self.pages.shape[2] // 2
        return kv_heads, self.q.shape[1] // kv_heads, self.q.shape[2]

    def decodes(self, rows: int) -> jax.Array:
        """Sequences that bring one token each, all together: [S N H], zero for the others."""
        kv_heads, group, size = self.heads
        q = self.q[:rows].reshape(rows, kv_heads, group, size)
        first_seen, lengths = self.batch.seen_by_decodes(self.window)
        oldest = jnp.min(jnp.where(lengths > 0, first_seen, jnp.iinfo(jnp.int32).max))

        def step(i: jax.Array, softmax: _Softmax) -> _Softmax:
            index = jax.lax.dynamic_slice(
                self.table, (jnp.zeros_like(i), i * self.per_block), (rows, self.per_block)
            )
            kv = cache.read(self.pages[index], q.dtype)
            kv = kv.reshape(rows, self.block, kv_heads, 2, size)
            scores = jnp.einsum(
                "RKGH,RSKH->RKGS", q, kv[:, :, :, 0], preferred_element_type=jnp.float32
            )
            scores *= size**-0.5
            position = i * self.block + jnp.arange(self.block, dtype=jnp.int32)[None, :]
            seen = (position < lengths[:, None]) & (position >= first_seen[:, None])
            # An unseen place may hold anything, and 0 x NaN is NaN.
            v = jnp.where(seen[:, :, None, None], kv[:, :, :, 1], 0)
            return softmax.add(scores, seen, "RKGS,RSKH->RKGH", v)

        start = jnp.maximum(oldest, 0) // self.block
        stop = -(-jnp.max(lengths) // self.block)
        return jax.lax.fori_loop(start, stop, step, _Softmax.start(rows, self.heads)).finish()

    def chunks(self, out: jax.Array, query_block: int) -> jax.Array:
        """Prompt chunks, one sequence and one block of queries after the other, put into `out`.

        A block may extend past its sequence's end. The rows it writes there are overwritten when
        the next sequence is computed.
        """
        batch = self.batch

        def sequence(s: jax.Array, out: jax.Array) -> jax.Array:
            start, stop = batch.query_starts[s], batch.query_starts[s + 1]

            def queries(i: jax.Array, out: jax.Array) -> jax.Array:
                place = start + i * query_block
                mixed = self._query_block(s, place, stop, query_block)
                zero = jnp.zeros_like(place)
                return jax.lax.dynamic_update_slice(out, mixed, (place, zero, zero))

            blocks = -(-(stop - start) // query_block)
            return jax.lax.fori_loop(0, blocks, queries, out)

        return jax.lax.fori_loop(batch.num_decodes, batch.num_sequences, sequence, out)

    def _query_block(
        self, s: jax.Array, place: jax.Array, stop: jax.Array, query_block: int
    ) -> jax.Array:
        kv_heads, group, size = self.heads
        zero = jnp.zeros_like(place)
        q = jax.lax.dynamic_slice(
            self.q, (place, zero, zero), (query_block, kv_heads * group, size)
        ).reshape(query_block, kv_heads, group, size)
        length = self.batch.lengths[s]
        first = length - (stop - place)  # position of the block's first query
        at = (first + jnp.arange(query_block, dtype=jnp.int32))[:, None]

        def step(i: jax.Array, softmax: _Softmax) -> _Softmax:
            index = jax.lax.dynamic_slice(self.table, (s, i * self.per_block), (1, self.per_block))
            kv = cache.read(self.pages[index[0]], q.dtype).reshape(self.block, kv_heads, 2, size)
            scores = jnp.einsum(
                "RKGH,SKH->RKGS", q, kv[:, :, 0], preferred_element_type=jnp.float32
            )
            scores *= size**-0.5
            position = i * self.block + jnp.arange(self.block, dtype=jnp.int32)[None, :]
            seen = (position <= at) & (position < length)
            if self.window is not None:
                seen &= position > at - self.window
            v = jnp.where(jnp.any(seen, axis=0)[:, None, None], kv[:, :, 1], 0)
            return softmax.add(scores, seen, "RKGS,SKH->RKGH", v)

        oldest = zero if self.window is None else jnp.maximum(first - self.window + 1, 0)
        newest = jnp.minimum(first + query_block, length)
        softmax = _Softmax.start(query_block, self.heads)
        blocks = (oldest // self.block, -(-newest // self.block))
        return jax.lax.fori_loop(*blocks, step, softmax).finish()
