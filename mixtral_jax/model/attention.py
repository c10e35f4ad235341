"""Grouped-query attention (arXiv:2305.13245) with an optional sliding window (arXiv:2310.06825).

Two equal forms. Full sequence: every row of a batch sees itself; training and parity. Paged: new
tokens of many sequences in one flat row, keys and values in pages. The paged XLA form here walks
over blocks of pages with a running softmax (arXiv:2205.14135), so its cost follows the tokens that
are present, not the width of the page table: decodes all at once, then prompt chunks one by one.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mixtral_jax import cache
from mixtral_jax.axes import (
    FlatHidden,
    FlatKeys,
    FlatQueries,
    Pages,
    RowHidden,
    RowKeys,
    RowQueries,
)
from mixtral_jax.cache import RaggedBatch
from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.cpu import native
from mixtral_jax.kernels.gpu import attention as gpu
from mixtral_jax.kernels.tpu import attention as tpu
from mixtral_jax.model.layers import Linear, Rotary, project
from mixtral_jax.sharding import Layout

# Tokens per step of the walk over keys, and over the queries of one prompt chunk.
_KEY_BLOCK = 128
_QUERY_BLOCK = 64


class Attention(nnx.Module):
    """Projections and both forms of attention of one layer."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
        layout: Layout | None = None,
    ) -> None:
        self.layout = layout
        self.q = Linear("NH", "D", config, dtype, rngs)
        self.k = Linear("KH", "D", config, dtype, rngs)
        self.v = Linear("KH", "D", config, dtype, rngs)
        self.o = Linear("D", "NH", config, dtype, rngs)
        self.window = config.sliding_window

    def full(self, x: RowHidden, rotary: Rotary) -> RowHidden:
        """Causal attention within each row: x [B T D] -> [B T D]."""
        q, k, v = rotary.rotate(self.q(x)), rotary.rotate(self.k(x)), self.v(x)
        mixed = full_attention(q, k, v, self.window, self.layout)
        out: jax.Array = self.o(mixed)
        return out

    def paged(
        self, x: FlatHidden, rotary: Rotary, pages: Pages, batch: RaggedBatch
    ) -> tuple[FlatHidden, Pages]:
        """Writes the new keys and values, then attends: x [T D] -> [T D] and the pages."""
        q, k, v = project(x, self.q, self.k, self.v)
        q, k = rotary.rotate(q), rotary.rotate(k)
        platform = None if self.layout is None else self.layout.platform
        mixed, pages = write_and_attend(q, k, v, pages, batch, self.window, platform)
        out = project(mixed, self.o)[0]
        return out if self.layout is None else self.layout.total(out, "N"), pages


def full_attention(
    q: RowQueries, k: RowKeys, v: RowKeys, window: int | None, layout: Layout | None = None
) -> RowQueries:
    """Causal attention within each row: q [B T N H], k and v [B T K H] -> [B T N H].

    On TPU by a kernel, if whole rows are there for every device.
    """
    if (
        layout is not None
        and layout.platform == "tpu"
        and tpu.fits_full(q)
        and q.shape[0] % layout.parts == 0
    ):
        queries, keys = layout.rules.spec("BTNH"), layout.rules.spec("BTKH")
        mixed: jax.Array = jax.shard_map(
            partial(tpu.full_attention, window=window),
            mesh=layout.mesh,
            in_specs=(queries, keys, keys),
            out_specs=queries,
            check_vma=False,  # kernels do not say over which axes they vary
        )(q, k, v)
        return mixed
    # jax counts the keys before the query, Mistral's window includes the query itself.
    before = None if window is None else (window - 1, 0)
    # It promotes dtypes by itself, which a caller's strict setting would refuse.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=before)


def write_and_attend(
    q: FlatQueries,
    k: FlatKeys,
    v: FlatKeys,
    pages: Pages,
    batch: RaggedBatch,
    window: int | None,
    platform: str | None = None,
) -> tuple[FlatQueries, Pages]:
    """`cache.write`, then `paged_attention`; on CPU one kernel, which leaves the pages in place.

    `platform` is what the mesh is of; without a mesh, None, only CPU has kernels.
    """
    if platform == "tpu" and tpu.fits_attention(pages):
        return tpu.write_and_attend(q, k, v, pages, batch, window)

    def xla() -> tuple[jax.Array, jax.Array]:
        written = cache.write(pages, k, v, batch)
        return paged_attention(q, written, batch, window, platform), written

    def on_cpu() -> tuple[jax.Array, jax.Array]:
        return native.paged(q, k, v, pages, batch, window)

    fits = q.dtype == jnp.float32 and q.shape[-1] % native.LANES == 0
    fits &= pages.dtype in (jnp.float32, jnp.int8)
    return native.on_cpu(on_cpu, xla) if fits else xla()


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
    platform: str | None = None,
) -> FlatQueries:
    """Attention of T new tokens over the pages of their sequences; q [T N H] -> [T N H].

    Query t at position p of its sequence sees the positions max(0, p - window + 1) .. p. Unused
    places of the batch give unspecified finite values. On GPU by kernels.
    """
    if platform == "gpu" and gpu.fits_attention(pages):
        return gpu.paged_attention(q, pages, batch, window)
    num_tokens, num_heads, head_size = q.shape
    num_sequences = batch.lengths.shape[0]
    per_block = max(1, _KEY_BLOCK // pages.shape[1])
    # Whole blocks: a slice at the table's end must not be shifted back.
    short = -batch.page_table.shape[1] % per_block
    table = jnp.pad(batch.page_table, ((0, 0), (0, short)))
    query_block = min(_QUERY_BLOCK, num_tokens)
    room = max(num_tokens, num_sequences) + query_block
    q = q * jnp.asarray(head_size**-0.5, q.dtype)
    q = jnp.pad(q, ((0, room - num_tokens), (0, 0), (0, 0)))
    walk = _Walk(q, pages, batch, table, per_block, window)
    out = jnp.zeros((room, num_heads, head_size), jnp.float32)
    out = jax.lax.dynamic_update_slice(out, walk.decodes(num_sequences), (0, 0, 0))
    if num_tokens > 1:
        out = walk.chunks(out, query_block)
    return out[:num_tokens].astype(q.dtype)


class _Walk(NamedTuple):
    q: jax.Array  # [room N H], scaled
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
            position = i * self.block + jnp.arange(self.block, dtype=jnp.int32)[None, :]
            seen = (position < lengths[:, None]) & (position >= first_seen[:, None])
            # What stands in an unseen place may be anything, and 0 x NaN is NaN.
            v = jnp.where(seen[:, :, None, None], kv[:, :, :, 1], 0)
            return softmax.add(scores, seen, "RKGS,RSKH->RKGH", v)

        start = jnp.maximum(oldest, 0) // self.block
        stop = -(-jnp.max(lengths) // self.block)
        return jax.lax.fori_loop(start, stop, step, _Softmax.start(rows, self.heads)).finish()

    def chunks(self, out: jax.Array, query_block: int) -> jax.Array:
        """Prompt chunks, one sequence and one block of queries after the other, put into `out`.

        A block that reaches past the end of its sequence writes there too; the sequence behind it
        writes later and so has the last word.
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
