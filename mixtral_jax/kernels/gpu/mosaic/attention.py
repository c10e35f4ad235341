"""Attention over pages on GPU, in Mosaic GPU.

One kernel for decodes and for prompts: a program has a tile of 64 rows of queries that share one
sequence and one key/value head, and walks over the sequence's pages with a running softmax
(arXiv:2205.14135). Of a decode the rows are the heads of its one token, and its pages are split
among several programs, whose parts are put together (Flash-Decoding). Of a prompt they are the
heads of several tokens.

XLA's form is taken for pages of float32, and where sizes do not fit.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Float, Float32

from mixtral_jax import cache
from mixtral_jax.axes import FlatKeys, FlatQueries, Pages
from mixtral_jax.cache import RaggedBatch
from mixtral_jax.kernels.gpu.mosaic.int8_pages import LoadedPage, fits_shared_memory
from mixtral_jax.kernels.gpu.mosaic.warpgroup import (
    ROWS,
    kernel,
    load,
    plgpu,
    product,
    store,
    swizzled,
)
from mixtral_jax.kernels.gpu.paged import decodes_and_prompts
from mixtral_jax.kernels.no_gradient import without_gradient
from mixtral_jax.kernels.xla import attention as xla

_KEPT = 16  # rows of a decode's tile that are written; its key/value head has as many heads at most
_PROGRAMS = 1024  # of decodes: enough to occupy a large card several times
_MOST_SPLITS = 8  # of a sequence
_PAGE_SIZES = (16, 32, 64, 128)
_LARGEST_PAGE = 64 * 128  # values of a head, of which the pages under way fit every card
_STAGES = 2  # pages under way
_NOTHING = -1e30  # finite, so that what has seen nothing stays free of inf - inf


class Tiles(NamedTuple):
    """Positions of its sequence that each tile of queries reads: all [tiles] i32.

    Rows stand token by token, `per_token` rows each.
    """

    sequence: jax.Array
    first: jax.Array  # position of its first token
    oldest: jax.Array  # first position that one of its tokens sees
    newest: jax.Array  # behind the last one; the tile is empty where it is 0


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
    if not fits(q, pages, interpret=interpret):
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


def fits(q: FlatQueries, pages: Pages, *, interpret: bool = False) -> bool:
    """Says whether the kernel takes such queries and pages; interpreted, also of float32."""
    (_, page_size, sides, _), size = pages.shape, q.shape[-1]
    if pages.dtype == jnp.int8 and not fits_shared_memory(page_size, size):
        return False
    is_small = pages.dtype in (jnp.int8, jnp.float8_e4m3fn)
    floats = (jnp.bfloat16, jnp.float16, *((jnp.float32,) if interpret else ()))
    takes_dtypes = q.dtype in floats and (is_small or pages.dtype == q.dtype)
    takes_sizes = page_size in _PAGE_SIZES and size in (32, 64, 128, 256)
    takes_sizes &= page_size * size <= _LARGEST_PAGE
    return takes_dtypes and takes_sizes and q.shape[1] // (sides // 2) <= _KEPT


def paged_attention(
    q: FlatQueries,
    pages: Pages,
    batch: RaggedBatch,
    window: int | None,
    *,
    interpret: bool = False,
) -> FlatQueries:
    """`xla.paged_attention`; unused places of the batch are zero."""
    return decodes_and_prompts(
        q,
        batch,
        lambda rows: decode(rows, pages, batch, window, interpret=interpret),
        lambda: prefill(q, pages, batch, window, interpret=interpret),
    )


def decode(
    q: Float[jax.Array, "S N H"],
    pages: Pages,
    batch: RaggedBatch,
    window: int | None,
    *,
    interpret: bool = False,
) -> Float32[jax.Array, "S N H"]:
    """Attention of one token of each decode; zeros for other sequences."""
    rows, heads, size = q.shape
    kv_heads = pages.shape[2] // 2
    group = heads // kv_heads
    q = q.reshape(rows, kv_heads, group, size)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, ROWS - group), (0, 0)))
    first, lengths = batch.seen_by_decodes(window)
    sequence = jnp.arange(rows, dtype=jnp.int32)
    tiles = Tiles(sequence, lengths - 1, jnp.maximum(first, 0), lengths)
    splits = max(1, min(_MOST_SPLITS, _PROGRAMS // (rows * kv_heads)))
    walk = partial(_walk, per_token=ROWS, splits=splits, window=window, interpret=interpret)
    mixed, peak, total = walk(q, pages, batch, tiles, "paged_decode")
    mixed, peak, total = mixed[..., :group, :], peak[..., :group], total[..., :group]
    weight = jnp.exp(peak - jnp.max(peak, axis=2, keepdims=True))
    total = jnp.sum(total * weight, axis=2)
    out = jnp.sum(mixed * weight[..., None], axis=2) / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(rows, heads, size)


def prefill(
    q: Float[jax.Array, "T N H"],
    pages: Pages,
    batch: RaggedBatch,
    window: int | None,
    *,
    interpret: bool = False,
) -> Float[jax.Array, "T N H"]:
    """Attention of the tokens of sequences that bring many; other places are unspecified.

    The sequence's keys and values, those of its new tokens included, are in its pages.
    """
    tokens, heads, size = q.shape
    kv_heads = pages.shape[2] // 2
    group = heads // kv_heads
    padded = 1 << (group - 1).bit_length()
    per_tile = ROWS // padded  # tokens
    # The grid has room for the tiles of any batch; those that this one does not need are empty.
    rows = batch.page_table.shape[0]
    row = jnp.arange(rows, dtype=jnp.int32)
    is_prompt = (row >= batch.num_decodes) & (row < batch.num_sequences)
    starts, stops = batch.query_starts[:-1], batch.query_starts[1:]
    counts = jnp.where(is_prompt, -(-(stops - starts) // per_tile), 0)
    last_tile = jnp.cumsum(counts, dtype=jnp.int32)
    first_tile = last_tile - counts
    tile = jnp.arange(-(-tokens // per_tile) + rows, dtype=jnp.int32)
    owner = jnp.searchsorted(last_tile, tile, side="right", method="compare_all").astype(jnp.int32)
    is_used = owner < rows
    owner = jnp.minimum(owner, rows - 1)
    begin = starts[owner] + (tile - first_tile[owner]) * per_tile
    first = batch.lengths[owner] - (stops[owner] - begin)
    newest = jnp.where(is_used, jnp.minimum(first + per_tile, batch.lengths[owner]), 0)
    oldest = 0 if window is None else jnp.maximum(first - window + 1, 0)
    oldest = jnp.where(is_used, oldest, 0)
    # A copy of the queries in which every tile stands by itself.
    place = jnp.clip(begin[:, None] + jnp.arange(per_tile, dtype=jnp.int32)[None, :], 0, tokens - 1)
    own = q[place].reshape(len(tile), per_tile, kv_heads, group, size)
    own = jnp.pad(own, ((0, 0), (0, 0), (0, 0), (0, padded - group), (0, 0)))
    own = own.transpose(0, 2, 1, 3, 4).reshape(len(tile), kv_heads, ROWS, size)
    walk = partial(_walk, per_token=padded, splits=None, window=window, interpret=interpret)
    tiles = Tiles(owner, first, oldest, newest)
    (mixed,) = walk(own, pages, batch, tiles, "paged_prefill")
    mixed = mixed.reshape(len(tile), kv_heads, per_tile, padded, size)[:, :, :, :group]
    of_token = batch.sequence_of_token()
    among = jnp.arange(tokens, dtype=jnp.int32) - starts[of_token]
    at_tile = jnp.clip(first_tile[of_token] + among // per_tile, 0, len(tile) - 1)
    return mixed[at_tile, :, among % per_tile].reshape(tokens, heads, size)


def _walk(
    q: Float[jax.Array, "I K 64 H"],
    pages: Pages,
    batch: RaggedBatch,
    tiles: Tiles,
    name: str,
    *,
    per_token: int,
    splits: int | None,
    window: int | None,
    interpret: bool,
) -> Any:
    """Walks over the pages of every tile's sequence.

    Gives [I K 64 H] of q's dtype; of split tiles the parts: sums of values [I K splits 16 H],
    highest scores [I K splits 64], and sums of weights [I K splits 64], float32.
    """
    count, kv_heads, _, size = q.shape
    num_pages, page_size = pages.shape[:2]
    if splits is None:
        out = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    else:
        parts = (count, kv_heads, splits)
        shapes = ((*parts, _KEPT, size), (*parts, ROWS), (*parts, ROWS))
        out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    weights = (ROWS, page_size)
    scratch = [plgpu.SMEM(weights, q.dtype, transforms=swizzled(weights, q.dtype))]
    if splits is not None:
        scratch.append(plgpu.SMEM((ROWS, size), jnp.float32))
    # Where small numbers are widened: values, and of int8 the keys too.
    is_int8 = pages.dtype == jnp.int8
    for _ in range(2 if is_int8 else 1 if pages.dtype != q.dtype else 0):
        shape = (page_size, size)
        scratch.append(plgpu.SMEM(shape, q.dtype, transforms=swizzled(shape, q.dtype)))
    body = partial(_tile, size=size, per_token=per_token, window=window, interpret=interpret)
    grid = {"tile": count, "head": kv_heads, "split": splits or 1}
    if not is_int8:
        pages = pages.reshape(num_pages, page_size, -1)
    walked = kernel(body, out, grid, name, scratch=scratch, interpret=interpret)
    return walked(q, pages, batch.page_table, *tiles)


def _tile(  # type: ignore[no-untyped-def]
    q, pages, table, sequence, first, oldest, newest, *rest, size, per_token, window, interpret
):
    is_split = len(rest[0].shape) == 5  # [I K splits 16 H]
    out, parts = rest[0], rest[1:3] if is_split else ()
    weights_of, *more = rest[1 + len(parts) :]
    tile, head, split = (jax.lax.axis_index(axis) for axis in ("tile", "head", "split"))
    page_size, is_fp8 = pages.shape[1], pages.dtype == jnp.float8_e4m3fn
    row, old, new = sequence[tile], oldest[tile], newest[tile]
    # The pages of a sequence are shared out evenly, in order.
    start, stop = old // page_size, pl.cdiv(new, page_size)
    per_split = pl.cdiv(stop - start, jax.lax.axis_size("split"))
    begin = start + split * per_split
    end = jnp.minimum(begin + per_split, stop)
    of_total = plgpu.Layout.MMA_ACC(q.dtype)
    of_left, of_right = plgpu.Layout.MMA_LHS(q.dtype), plgpu.Layout.MMA_RHS(q.dtype)
    of_rows = of_total.reduce(1)
    queries = load(q.at[tile, head], of_left)

    def places(shape, axis, layout):  # type: ignore[no-untyped-def]
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)

    def by_row(values, width):  # type: ignore[no-untyped-def]
        return jax.lax.broadcast_in_dim(values, (ROWS, width), (0,))

    at = first[tile] + places((ROWS, page_size), 0, of_total) // per_token

    def copied(index, keys, values, state):  # type: ignore[no-untyped-def]
        turned = load(keys.T, of_right)
        turned = turned.astype(jnp.float32).astype(q.dtype) if is_fp8 else turned

        def values_of():  # type: ignore[no-untyped-def]
            if not is_fp8:
                return load(values, of_right)
            store(more[-1], values[...].astype(jnp.float32).astype(q.dtype))
            return load(more[-1], of_right)

        return step(begin + index[0], turned, values_of, state)

    def loaded(index, state):  # type: ignore[no-untyped-def]
        page = table[row, index]
        keys, values = (LoadedPage.of(pages, page, 2 * head + side, size) for side in (0, 1))
        keys.store(more[-2])
        values.store(more[-1])
        turned = load(more[-2].T, of_right)
        return step(index, turned, lambda: load(more[-1], of_right), state)

    def step(index, turned, values_of, state):  # type: ignore[no-untyped-def]
        mixed, peak, total = state
        base = index * page_size
        position = base + places((ROWS, page_size), 1, of_total)
        seen = (position <= at) & (position < new)
        if window is not None:
            seen &= position > at - window
        scores = plgpu.layout_cast(jnp.zeros((ROWS, page_size), jnp.float32), of_total)
        scores = product(scores, queries, turned, interpret=interpret) * size**-0.5
        scores = jnp.where(seen, scores, _NOTHING)
        higher = jnp.maximum(peak, jnp.max(scores, axis=1))
        weights = jnp.where(seen, jnp.exp(scores - by_row(higher, page_size)), 0.0)
        shrink = jnp.exp(peak - higher)
        # The right operand's threads hold other places than the total's: by shared memory.
        store(weights_of, weights.astype(weights_of.dtype))
        # A place that nobody sees may hold anything, and 0 x NaN is NaN.
        values = values_of()
        position = base + places((page_size, size), 0, of_right)
        is_written = (position >= old) & (position < new)
        values = jnp.where(is_written, values, jnp.zeros_like(values))
        mixed = product(
            mixed * by_row(shrink, size), load(weights_of, of_left), values, interpret=interpret
        )
        return mixed, higher, total * shrink + jnp.sum(weights, axis=1)

    def block(side):  # type: ignore[no-untyped-def]
        return plgpu.BlockSpec(
            (pl.squeezed, page_size, size),
            lambda i: (table[row, begin + i], 0, 2 * head + side),
            transforms=swizzled((page_size, size), pages.dtype),
        )

    nothing = (
        plgpu.layout_cast(jnp.zeros((ROWS, size), jnp.float32), of_total),
        plgpu.layout_cast(jnp.full((ROWS,), _NOTHING, jnp.float32), of_rows),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), of_rows),
    )
    if pages.dtype == jnp.int8:
        mixed, peak, total = jax.lax.fori_loop(begin, end, loaded, nothing)
    else:
        mixed, peak, total = plgpu.emit_pipeline(
            copied,
            grid=(jnp.maximum(end - begin, 0),),
            in_specs=(block(0), block(1)),
            max_concurrent_steps=_STAGES,
            init_carry=nothing,
        )(pages, pages)
    if not is_split:
        mixed = mixed / by_row(jnp.maximum(total, 1e-30), size)
        store(out.at[tile, head], mixed.astype(out.dtype))
        return
    # Rows that hold no head stay in shared memory.
    in_shared = more[0]
    store(in_shared, mixed)
    lines = plgpu.Layout.WG_STRIDED((_KEPT, size), vec_size=4)
    out[tile, head, split] = load(in_shared.at[pl.ds(0, _KEPT)], lines)
    store(parts[0].at[tile, head, split], peak)
    store(parts[1].at[tile, head, split], total)
