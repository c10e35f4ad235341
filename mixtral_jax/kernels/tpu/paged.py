"""Attention over pages in words (word_pages.py) on TPU: a Pallas kernel of ours.

Every program takes a tile of queries of one sequence, which is one token of a decode or up to
`_QUERIES` of a prompt, and walks over that sequence's pages in blocks with a running softmax
(arXiv:2205.14135). The next block is copied from memory while this one is computed, across tiles
too, so short sequences wait for no copy of their own. Scales never touch the keys and values: a
key's is multiplied onto its score and a value's onto its weight.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.axes import FlatQueries, WordPages
from mixtral_jax.cache import RaggedBatch
from mixtral_jax.kernels.tpu import word_pages
from mixtral_jax.kernels.tpu.tiles import LANES
from mixtral_jax.kernels.tpu.word_pages import WordSizes

_PAGES_PER_BLOCK = 4
_QUERIES = 32  # tokens of a tile of a prompt
_LEAST_ROWS = 16  # of a tile of bfloat16
_VMEM = 64 << 20  # of 128 MiB, which v5e, v5p and v6e have
_NOTHING = -1e30  # finite, so that what has seen nothing stays free of inf - inf


class Tiles(NamedTuple):
    """Tiles of queries, those in use first: all i32."""

    owner: jax.Array  # [I] sequence
    place: jax.Array  # [I] flat place of the first query
    first: jax.Array  # [I] position of the first query
    size: jax.Array  # [I] queries
    used: jax.Array  # [1] tiles in use

    @classmethod
    def of_decodes(cls, batch: RaggedBatch) -> "Tiles":
        """A tile for each sequence that brings one token."""
        row = jnp.arange(batch.lengths.shape[0], dtype=jnp.int32)
        place = jnp.minimum(row, batch.tokens.shape[0] - 1)
        return cls(row, place, batch.lengths - 1, jnp.ones_like(row), batch.num_decodes[None])

    @classmethod
    def of_prompts(cls, batch: RaggedBatch) -> tuple["Tiles", jax.Array]:
        """Tiles of the other sequences, with room for any batch; the first tile of each [S]."""
        tokens, rows = batch.tokens.shape[0], batch.lengths.shape[0]
        row = jnp.arange(rows, dtype=jnp.int32)
        is_prompt = (row >= batch.num_decodes) & (row < batch.num_sequences)
        starts, stops = batch.query_starts[:-1], batch.query_starts[1:]
        tiles = jnp.where(is_prompt, -(-(stops - starts) // _QUERIES), 0)
        ends = jnp.cumsum(tiles, dtype=jnp.int32)
        tile = jnp.arange(-(-tokens // _QUERIES) + rows, dtype=jnp.int32)
        owner = jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32)
        owner = jnp.minimum(owner, rows - 1)
        place = starts[owner] + (tile - (ends - tiles)[owner]) * _QUERIES
        size = jnp.clip(stops[owner] - place, 0, _QUERIES)
        first = batch.lengths[owner] - (stops[owner] - place)
        return cls(owner, place, first, size, ends[-1:]), ends - tiles


def paged_attention(
    q: FlatQueries,
    pages: WordPages,
    batch: RaggedBatch,
    window: int | None,
    kv_heads: int,
    *,
    interpret: bool = False,
) -> FlatQueries:
    """`xla.paged_attention` over pages in words; q [T N H] -> [T N H]."""
    tokens, heads, size = q.shape
    group = heads // kv_heads
    grouped = q.reshape(tokens, kv_heads, group, size)
    attend = functools.partial(
        _attend_tiles, pages=pages, batch=batch, window=window, interpret=interpret
    )
    tiles = Tiles.of_decodes(batch)
    out = attend(grouped[tiles.place], tiles=tiles, group=group)
    out = out.reshape(-1, heads, size)[:tokens]
    out = jnp.pad(out, ((0, tokens - len(out)), (0, 0), (0, 0)))
    if tokens > 1:
        tiles, first_tile = Tiles.of_prompts(batch)
        many = jnp.arange(_QUERIES, dtype=jnp.int32)
        places = jnp.minimum(tiles.place[:, None] + many[None], tokens - 1)
        rows = grouped[places].transpose(0, 2, 1, 3, 4)  # [I K Q G H]
        rows = rows.reshape(len(places), kv_heads, _QUERIES * group, size)
        prompts = attend(rows, tiles=tiles, group=group)
        prompts = prompts.reshape(-1, kv_heads, _QUERIES, group, size)
        token = jnp.arange(tokens, dtype=jnp.int32)
        sequence = batch.sequence_of_token()
        inside = jnp.maximum(token - batch.query_starts[sequence], 0)
        tile = jnp.minimum(first_tile[sequence] + inside // _QUERIES, len(places) - 1)
        chosen = prompts[tile, :, inside % _QUERIES].reshape(tokens, heads, size)
        out = jnp.where((token >= batch.num_decodes)[:, None, None], chosen, out)
    return out


def _attend_tiles(
    q: jax.Array,
    *,
    tiles: Tiles,
    group: int,
    pages: jax.Array,
    batch: RaggedBatch,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    """Queries [I K Q*G H] of tiles, G of each token next to one another -> the same of values."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    num_tiles, kv_heads, rows, size = q.shape
    form = WordSizes.of(pages, kv_heads)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -rows % _LEAST_ROWS), (0, 0)))
    table = batch.page_table
    per_block = min(_PAGES_PER_BLOCK, table.shape[1])
    span = per_block * form.page_size
    oldest = 0 if window is None else jnp.maximum(tiles.first - window + 1, 0)
    behind = tiles.first + tiles.size
    begin = jnp.broadcast_to(oldest // span, behind.shape).astype(jnp.int32)
    scalars = (begin, -(-behind // span), -(-behind // form.page_size), tiles.first, tiles.owner)
    block = (1, kv_heads, q.shape[2], size)

    def of_tile(tile, *_):  # type: ignore[no-untyped-def]
        return tile, 0, 0, 0

    narrow = pltpu.VMEM((kv_heads, q.shape[2], LANES), jnp.float32)
    out: jax.Array = pl.pallas_call(
        functools.partial(_kernel, form=form, group=group, window=window),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars) + 2,
            grid=(num_tiles,),
            in_specs=[pl.BlockSpec(block, of_tile), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(block, of_tile),
            scratch_shapes=[
                pltpu.VMEM((2, per_block, *pages.shape[1:]), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM(block[1:], jnp.float32),
                narrow,
                narrow,
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM
        ),
        interpret=interpret,
        name="word_paged_attention",
    )(*scalars, tiles.used, table, q, pages)
    return out[:, :, :rows]


def _kernel(  # type: ignore[no-untyped-def]
    begin, end, held, first, owner, used, table, q, pages, out,
    buffers, arrived, turn, mixed, peak, total, *, form, group, window,
):  # fmt: skip
    """One tile. `begin` and `end` are its blocks, `held` the pages that its queries see."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    tile = pl.program_id(0)
    per_block = buffers.shape[1]

    def copies(of_tile, block, slot, act):  # type: ignore[no-untyped-def]
        for i in range(per_block):
            index = block * per_block + i

            @pl.when(index < held[of_tile])
            def copy_page(i=i, index=index) -> None:  # type: ignore[no-untyped-def]
                page = table[owner[of_tile], index]
                act(pltpu.make_async_copy(pages.at[page], buffers.at[slot, i], arrived.at[slot]))

    @pl.when(tile == 0)
    def begin_walk() -> None:
        turn[0] = 0

        @pl.when(used[0] > 0)
        def copy_first() -> None:
            copies(0, begin[0], 0, lambda copy: copy.start())

    @pl.when(tile < used[0])
    def attend_tile() -> None:
        mixed[...] = jnp.zeros_like(mixed)
        total[...] = jnp.zeros_like(total)
        peak[...] = jnp.full_like(peak, _NOTHING)

        def step(block, _):  # type: ignore[no-untyped-def]
            slot = jax.lax.rem(turn[0], 2)
            is_last = block + 1 == end[tile]
            next_tile = jnp.where(is_last, tile + 1, tile)
            within = jnp.minimum(next_tile, begin.shape[0] - 1)

            @pl.when(next_tile < used[0])
            def copy_next() -> None:
                next_block = jnp.where(is_last, begin[within], block + 1)
                copies(within, next_block, 1 - slot, lambda copy: copy.start())

            copies(tile, block, slot, lambda copy: copy.wait())
            _attend_block(
                q.at[0], buffers.at[slot], mixed, peak, total,
                form=form, group=group, window=window,
                start=block * per_block * form.page_size, first=first[tile],
            )  # fmt: skip
            turn[0] = turn[0] + 1

        jax.lax.fori_loop(begin[tile], end[tile], step, None)
        out[0] = (mixed[...] / jnp.maximum(total[:, :, :1], 1e-30)).astype(out.dtype)

    @pl.when(tile >= used[0])
    def leave_tile() -> None:
        out[...] = jnp.zeros_like(out)


def _attend_block(q, buffer, mixed, peak, total, *, form, group, window, start, first):  # type: ignore[no-untyped-def]
    """Takes a block of pages, the first of which begins at position `start`, into the sums."""
    num_rows, size = q.shape[1:]
    shape = (num_rows, form.rows)
    query = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0) // group
    key = start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    for head in range(q.shape[0]):
        queries = q[head]
        scores, values = [], []
        for i, word, slot, offset in _parts(head, buffer.shape[0], form):
            words = buffer[i, word, : form.rows, :]
            keys, key_scale = _values(buffer, words, i, word, slot, form, queries.dtype)
            scored = jax.lax.dot_general(
                queries, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            scored *= size**-0.5
            if key_scale is not None:
                scored *= key_scale
            position = key + (i * form.page_size + offset)
            seen = position <= query
            if window is not None:
                seen &= position > query - window
            scores.append(jnp.where(seen, scored, _NOTHING))
            values.append((i, word, slot + 1))
        before = peak[head][:, :1]
        highest = functools.reduce(jnp.maximum, [jnp.max(x, axis=1, keepdims=True) for x in scores])
        highest = jnp.maximum(before, highest)
        shrink = jnp.exp(before - highest)
        added, weight_sum = mixed[head] * shrink, total[head][:, :1] * shrink
        for scored, (i, word, slot) in zip(scores, values, strict=True):
            weights = jnp.where(scored > _NOTHING, jnp.exp(scored - highest), 0.0)
            weight_sum += jnp.sum(weights, axis=1, keepdims=True)
            words = buffer[i, word, : form.rows, :]
            held, value_scale = _values(buffer, words, i, word, slot, form, queries.dtype)
            if value_scale is not None:
                weights *= value_scale
            added += jax.lax.dot_general(
                weights.astype(held.dtype),
                held,
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
        mixed[head] = added
        peak[head] = jnp.broadcast_to(highest, peak.shape[1:])
        total[head] = jnp.broadcast_to(weight_sum, total.shape[1:])


def _parts(head: int, num_pages: int, form: WordSizes) -> list[tuple[int, int, int, int]]:
    """Page, word, slot of the key and position within the page, of each part of a head's keys."""
    if form.tokens_of_word == 2:
        return [(i, 0, 2 * half, half * form.rows) for i in range(num_pages) for half in (0, 1)]
    return [(i, head // 2, 2 * (head % 2), 0) for i in range(num_pages)]


def _values(buffer, words, i, word, slot, form, dtype):  # type: ignore[no-untyped-def]
    """Values [rows H] of a slot in `dtype`, and their scales [1 rows]; None for fp8."""
    if not form.has_scales:
        return word_pages.fp8_of(word_pages.slot_of(words, slot)).astype(dtype), None
    values = word_pages.signed_slot_of(words, slot).astype(jnp.float32).astype(dtype)
    codes = buffer[i, word, form.rows : form.rows + 1, :]
    return values, word_pages.scale_of(word_pages.slot_of(codes, slot))[:, : form.rows]
