"""Attention over pages on GPU, in Pallas by way of Triton.

    decode   attention of one new token of each sequence over its pages: every program walks over
             a part of one sequence's pages for one key/value head, and the parts are put together
             (arXiv:2205.14135; split as in Flash-Decoding)
    prefill  the same for sequences that bring many tokens: every program takes a tile of queries of
             one sequence, and the heads that share a key/value head stand in it row by row

Pages of int8 and fp8 are widened to the dtype of the queries block by block, which is exact. The
scales of int8 keys multiply the scores, those of values the weights.

The XLA form is taken where a kernel's limits are not met. Products of float32 are as precise as jax
makes them on that GPU (`jax_default_matmul_precision`; by default TF32, as XLA's).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Float32

from mixtral_jax import cache
from mixtral_jax.axes import FlatKeys, FlatQueries, Lengths, Pages, PageTable
from mixtral_jax.cache import RaggedBatch
from mixtral_jax.kernels.gpu.paged import decodes_and_prompts
from mixtral_jax.kernels.no_gradient import without_gradient
from mixtral_jax.kernels.xla import attention as xla

_KEYS_PER_BLOCK = 64
_SPLITS = 8  # of a sequence, so that few sequences occupy all of a GPU
_LEAST = 16  # rows of a tensor core's product
_QUERIES = 128  # rows of a tile of queries: tokens x heads
_NOTHING = -1e30  # finite, so that what has seen nothing stays free of inf - inf
_SMALL = (jnp.int8, jnp.float8_e4m3fn)  # the dtypes of pages that are widened
# Pallas counts the elements of arrays of up to 4 GiB in 32 bits with a sign (jax 0.10 to 0.12).
_COUNTED = range(2**31, 2**32 + 1)


def attend(
    q: FlatQueries,
    k: FlatKeys,
    v: FlatKeys,
    pages: Pages,
    batch: RaggedBatch,
    window: int | None,
    *,
    interpret: bool = False,
) -> tuple[FlatQueries, Pages]:
    """`xla.attend`: writes k and v [T K H], then attends: q [T N H] -> [T N H] and the pages.

    Pages may be float8_e4m3fn, which needs compute capability 8.9.
    """
    q, k, v = (without_gradient("paged attention (attend)", x) for x in (q, k, v))
    if not fits(q, pages):
        return xla.attend(q, k, v, pages, batch, window)
    written = cache.write(pages, k, v, batch)
    return paged_attention(q, written, batch, window, interpret=interpret), written


def attend_without_fp8(
    q: FlatQueries,
    k: FlatKeys,
    v: FlatKeys,
    pages: Pages,
    batch: RaggedBatch,
    window: int | None,
    *,
    interpret: bool = False,
) -> tuple[FlatQueries, Pages]:
    """`attend` for cards below 8.9: pages of fp8 take XLA's form."""
    if pages.dtype == jnp.float8_e4m3fn:
        return xla.attend(q, k, v, pages, batch, window)
    return attend(q, k, v, pages, batch, window, interpret=interpret)


def fits(q: FlatQueries, pages: Pages) -> bool:
    """Says whether the kernels take such pages: heads and blocks of powers of two."""
    page_size, size = pages.shape[1], q.shape[-1]
    takes_dtype = pages.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
    if pages.dtype in _SMALL:
        takes_dtype = math.prod(pages.shape) not in _COUNTED
    return takes_dtype and _is_power(size) and size >= _LEAST and _KEYS_PER_BLOCK % page_size == 0


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0


def _dtype_of(q: jax.Array, pages: Pages) -> jnp.dtype:
    """The dtype in which queries meet keys."""
    return q.dtype if pages.dtype in _SMALL else pages.dtype


def paged_attention(
    q: FlatQueries,
    pages: Pages,
    batch: RaggedBatch,
    window: int | None,
    *,
    interpret: bool = False,
) -> FlatQueries:
    """`xla.paged_attention`; unused places of the batch are zero."""
    first, lengths = batch.seen_by_decodes(window)
    return decodes_and_prompts(
        q,
        batch,
        lambda rows: decode(rows, pages, batch.page_table, first, lengths, interpret=interpret),
        lambda: prefill(q, pages, batch, window, interpret=interpret),
    )


def decode(
    q: Float[jax.Array, "S N H"],
    pages: Pages,
    table: PageTable,
    first: Lengths,
    lengths: Lengths,
    *,
    interpret: bool = False,
) -> Float32[jax.Array, "S N H"]:
    """Attention of one token of each sequence over its positions first .. lengths - 1.

    Sequences of length 0 give zeros.
    """
    rows, heads, size = q.shape
    page_size, kv_heads = pages.shape[1], pages.shape[2] // 2
    group = heads // kv_heads
    padded = max(_LEAST, 1 << (group - 1).bit_length())
    q = q.reshape(rows, kv_heads, group, size).astype(_dtype_of(q, pages))
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - group), (0, 0)))
    per_block = _KEYS_PER_BLOCK // page_size
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % per_block)))
    # The blocks of a sequence are shared out evenly, in order.
    start = jnp.maximum(first, 0) // _KEYS_PER_BLOCK
    stop = -(-lengths // _KEYS_PER_BLOCK)
    per_split = -(-(stop - start) // _SPLITS)
    # The splits stand one behind the other; behind the last is room for rows that are not kept.
    parts = (rows, kv_heads, (_SPLITS - 1) * group + padded)
    results = pl.pallas_call(
        functools.partial(_decode_split, per_block=per_block, group=group),
        out_shape=(
            jax.ShapeDtypeStruct((*parts, size), jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        ),
        grid=(rows, kv_heads, _SPLITS),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_decode",
    )(q, pages, table, jnp.maximum(first, 0), lengths, start, per_split)
    mixed, peak, total = (
        array[:, :, : _SPLITS * group].reshape(rows, kv_heads, _SPLITS, group, *array.shape[3:])
        for array in results
    )
    highest = jnp.max(peak, axis=2, keepdims=True)
    weight = jnp.exp(peak - highest)
    total = jnp.sum(total * weight, axis=2)
    out = jnp.sum(mixed * weight[..., None], axis=2) / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(rows, heads, size)


def _decode_split(  # type: ignore[no-untyped-def]
    q, pages, table, first, lengths, start, per_split, mixed, peak, total, *, per_block, group
):
    row, head, split = (pl.program_id(axis) for axis in range(3))
    block = per_block * pages.shape[1]
    queries = q[row, head]
    begin = start[row] + split * per_split[row]
    end = jnp.minimum(begin + per_split[row], pl.cdiv(lengths[row], block))

    def step(i, state):  # type: ignore[no-untyped-def]
        keys, values = _block_of_pages(pages, table, row, head, i, per_block, queries)
        position = i * block + jnp.arange(block, dtype=jnp.int32)
        seen = (position >= first[row]) & (position < lengths[row])
        return _attend(state, queries, keys, values, seen[None, :], seen)

    sums = jax.lax.fori_loop(begin, end, step, _nothing_seen(queries.shape))
    places = pl.ds(split * group, len(queries))
    is_kept = jnp.arange(len(queries), dtype=jnp.int32) < group
    plgpu.store(mixed.at[row, head, places], sums[0], mask=is_kept[:, None])
    plgpu.store(peak.at[row, head, places], sums[1], mask=is_kept)
    plgpu.store(total.at[row, head, places], sums[2], mask=is_kept)


def prefill(
    q: Float[jax.Array, "T N H"],
    pages: Pages,
    batch: RaggedBatch,
    window: int | None,
    *,
    interpret: bool = False,
) -> Float32[jax.Array, "T N H"]:
    """Attention of the tokens of sequences that bring many; other places are not written.

    The sequence's keys and values, those of its new tokens included, are in
    its pages.
    """
    tokens, heads, size = q.shape
    page_size, kv_heads = pages.shape[1], pages.shape[2] // 2
    group = heads // kv_heads
    padded = 1 << (group - 1).bit_length()
    per_tile = _QUERIES // padded  # tokens
    q = q.reshape(tokens, kv_heads, group, size).astype(_dtype_of(q, pages))
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - group), (0, 0)))
    q = q.transpose(1, 0, 2, 3).reshape(kv_heads, tokens * padded, size)
    per_block = _KEYS_PER_BLOCK // page_size
    table = jnp.pad(batch.page_table, ((0, 0), (0, -batch.page_table.shape[1] % per_block)))
    # The grid has room for the tiles of any batch; those that this one does not need are empty.
    rows = table.shape[0]
    row = jnp.arange(rows, dtype=jnp.int32)
    is_prompt = (row >= batch.num_decodes) & (row < batch.num_sequences)
    starts, stops = batch.query_starts[:-1], batch.query_starts[1:]
    tiles = jnp.where(is_prompt, -(-(stops - starts) // per_tile), 0)
    last_tile = jnp.cumsum(tiles, dtype=jnp.int32)
    tile = jnp.arange(-(-tokens // per_tile) + rows, dtype=jnp.int32)
    owner = jnp.searchsorted(last_tile, tile, side="right", method="compare_all").astype(jnp.int32)
    is_used = owner < rows
    owner = jnp.minimum(owner, rows - 1)
    place = starts[owner] + (tile - (last_tile - tiles)[owner]) * per_tile
    place = jnp.where(is_used, place, stops[owner])
    out: jax.Array = pl.pallas_call(
        functools.partial(_prefill_tile, per_block=per_block, padded=padded, window=window),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        grid=(len(tile), kv_heads),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="paged_prefill",
    )(q, pages, table, owner, place, stops, batch.lengths)
    out = out.reshape(kv_heads, tokens, padded, size)[:, :, :group]
    return out.transpose(1, 0, 2, 3).reshape(tokens, heads, size)


def _prefill_tile(q, pages, table, owner, place, stops, lengths, out, *, per_block, padded, window):  # type: ignore[no-untyped-def]
    tile, head = pl.program_id(0), pl.program_id(1)
    row, begin = owner[tile], place[tile]
    stop, length = stops[row], lengths[row]
    block = per_block * pages.shape[1]
    places = pl.ds(begin * padded, _QUERIES)
    token = jnp.arange(_QUERIES, dtype=jnp.int32) // padded
    is_mine = begin + token < stop
    first = length - (stop - begin)  # position of the tile's first token
    at = first + token
    oldest = 0 if window is None else jnp.maximum(first - window + 1, 0)
    newest = jnp.minimum(first + _QUERIES // padded, length)

    @pl.when(begin < stop)
    def _() -> None:
        queries = plgpu.load(q.at[head, places], mask=is_mine[:, None], other=0)

        def step(i, state):  # type: ignore[no-untyped-def]
            keys, values = _block_of_pages(pages, table, row, head, i, per_block, queries)
            position = i * block + jnp.arange(block, dtype=jnp.int32)
            seen = position[None, :] <= at[:, None]
            if window is not None:
                seen &= position[None, :] > at[:, None] - window
            is_written = (position >= oldest) & (position < newest)
            return _attend(state, queries, keys, values, seen, is_written)

        blocks = (oldest // block, pl.cdiv(newest, block))
        mixed, _, total = jax.lax.fori_loop(*blocks, step, _nothing_seen(queries.shape))
        mixed = mixed / jnp.maximum(total, 1e-30)[:, None]
        plgpu.store(out.at[head, places], mixed, mask=is_mine[:, None])


class _Side(NamedTuple):
    """The keys, or the values, of a block of positions for one head [block H].

    Those of int8 have scales, [block] f32.
    """

    numbers: jax.Array
    scale: jax.Array | None


def _block_of_pages(pages, table, row, head, i, per_block, queries):  # type: ignore[no-untyped-def]
    """The i-th keys and values of a sequence, for one key/value head, in the dtype of queries."""
    index = table[row, pl.ds(i * per_block, per_block)]
    block, size = per_block * pages.shape[1], queries.shape[1]

    def side(place):  # type: ignore[no-untyped-def]
        numbers = pages[index, :, place, pl.ds(0, size)].reshape(block, size)
        numbers = numbers.astype(queries.dtype)
        if pages.dtype != jnp.int8:
            return _Side(numbers, None)
        # The four bytes of a float32, the lowest first; a row of H + 4 bytes is aligned to four.
        bits = jnp.zeros(block, jnp.int32)
        for byte in range(pages.shape[3] - size):
            of_byte = pages[index, :, place, size + byte].reshape(block).astype(jnp.int32)
            bits |= (of_byte & 255) << 8 * byte
        return _Side(numbers, jax.lax.bitcast_convert_type(bits, jnp.float32))

    return side(2 * head), side(2 * head + 1)


def _nothing_seen(shape):  # type: ignore[no-untyped-def]
    """The sum under way of so many rows: of values, the highest score, of weights."""
    rows, _ = shape
    return (
        jnp.zeros(shape, jnp.float32),
        jnp.full(rows, _NOTHING, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )


def _attend(state, queries, keys, values, seen, is_written):  # type: ignore[no-untyped-def]
    """Takes a block of keys into the sum; `seen` by rows of queries."""
    mixed, peak, total = state
    # A place that nobody sees may hold anything, and 0 x NaN is NaN.
    numbers = jnp.where(is_written[:, None], values.numbers, jnp.zeros((), queries.dtype))
    scores = jax.lax.dot_general(
        queries, keys.numbers, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    scores *= queries.shape[1] ** -0.5  # in float32: 1/sqrt(128) is no bfloat16
    if keys.scale is not None:
        scores *= keys.scale[None, :]
    scores = jnp.where(seen, scores, _NOTHING)
    higher = jnp.maximum(peak, jnp.max(scores, axis=1))
    weights = jnp.where(seen, jnp.exp(scores - higher[:, None]), 0.0)
    shrink = jnp.exp(peak - higher)
    scaled = weights
    if values.scale is not None:
        scaled = weights * jnp.where(is_written, values.scale, 0.0)[None, :]
    added = jax.lax.dot_general(
        scaled.astype(numbers.dtype),
        numbers,
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return mixed * shrink[:, None] + added, higher, total * shrink + jnp.sum(weights, axis=1)
