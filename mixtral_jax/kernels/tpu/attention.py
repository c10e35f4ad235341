"""Attention on TPU by the kernels of JAX's own collection, and one of ours for small numbers.

The XLA form is taken where a kernel's limits are not met. Sizes of blocks are always given: left
out, the kernels would ask the default device, which is another one where programs are compiled for
hardware that is elsewhere.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mixtral_jax import cache
from mixtral_jax.axes import FlatKeys, FlatQueries, Pages, RowKeys, RowQueries, Segments
from mixtral_jax.cache import PageForm, RaggedBatch
from mixtral_jax.kernels.no_gradient import without_gradient
from mixtral_jax.kernels.tpu import paged, word_pages
from mixtral_jax.kernels.tpu.tiles import LANES, largest_tile
from mixtral_jax.kernels.xla import attention as xla
from mixtral_jax.kernels.xla import blockwise
from mixtral_jax.layout import Layout

_KEYS_PER_BLOCK = 512
_QUERIES_PER_BLOCK = 64
_VMEM = 64 << 20  # of 128 MiB, which v5e, v5p and v6e have


def _fits_pages(pages: Pages | jax.ShapeDtypeStruct) -> bool:
    """Says whether the kernel takes such pages: heads fill whole tiles."""
    packed, rest = divmod(pages.shape[2] * pages.dtype.itemsize, 4)
    is_tiled = rest == 0 and (packed in (1, 2, 4) or (packed > 0 and packed % 8 == 0))
    floats = pages.dtype in (jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn)
    return floats and is_tiled and pages.shape[3] % LANES == 0


def page_form(page_size: int, kv_heads: int, head_size: int, dtype: DTypeLike) -> PageForm:
    """Pages of floats for JAX's kernel, of int8 in words for ours; fp8 goes where it fits.

    Raises ConfigError for int8 and fp8 of sizes that neither takes.
    """
    form = cache.page_form(page_size, kv_heads, head_size, dtype)
    if form.dtype.itemsize > 1 or _fits_pages(jax.ShapeDtypeStruct((1, *form.shape), form.dtype)):
        return form
    return word_pages.page_form(page_size, kv_heads, head_size, dtype)


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
    """`xla.attend` by ragged paged attention, whose window counts the query itself, as ours.

    Pages in words (word_pages.py) are for a kernel of ours.
    """
    q, k, v = (without_gradient("paged attention (attend)", x) for x in (q, k, v))
    if pages.dtype == jnp.int32:
        pages = word_pages.write(pages, k, v, batch)
        heads = k.shape[1]
        return paged.paged_attention(q, pages, batch, window, heads, interpret=interpret), pages
    if not _fits_pages(pages):
        return xla.attend(q, k, v, pages, batch, window)
    # Imported where it is used: it takes a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    pages = cache.write(pages, k, v, batch)
    # A scale is what makes the kernel widen fp8, as our XLA form does.
    scale = 1.0 if pages.dtype == jnp.float8_e4m3fn else None
    page_size, table_width = pages.shape[1], batch.page_table.shape[1]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        mixed: jax.Array = ragged_paged_attention(
            q,
            pages,
            batch.lengths,
            batch.page_table,
            batch.query_starts,
            batch.num_sequences[None],
            sm_scale=q.shape[-1] ** -0.5,
            sliding_window=window,
            k_scale=scale,
            v_scale=scale,
            num_kv_pages_per_block=min(table_width, max(1, _KEYS_PER_BLOCK // page_size)),
            num_queries_per_block=min(q.shape[0], _QUERIES_PER_BLOCK),
            vmem_limit_bytes=_VMEM,
        )
    return mixed, pages


def _fits_rows(q: RowQueries) -> bool:
    """Says whether the kernel takes such sequences [B T N H]: whole tiles."""
    return q.shape[1] % LANES == 0 == q.shape[3] % LANES


def full_attention(
    q: RowQueries,
    k: RowKeys,
    v: RowKeys,
    window: int | None,
    layout: Layout | None,
    segments: Segments | None = None,
    *,
    interpret: bool = False,
) -> RowQueries:
    """`xla.full_attention`, which keeps all T x T scores of every head; differentiable.

    Under a mesh every device computes its own rows and heads, if whole rows are there for each.
    """
    groups = 1 if layout is None else layout.num_sequence_groups
    if not _fits_rows(q) or q.shape[0] % groups:
        return blockwise.full_attention(q, k, v, window, layout, segments)

    def attend(
        q: RowQueries, k: RowKeys, v: RowKeys, segments: Segments | None = None
    ) -> RowQueries:
        return splash_attention(q, k, v, window, segments, interpret=interpret)

    given = (q, k, v) if segments is None else (q, k, v, segments)
    if layout is None:
        return attend(*given)
    queries, keys = layout.rules.spec("BTNH"), layout.rules.spec("BTKH")
    specs = (queries, keys, keys, layout.rules.spec("BT"))
    mixed: jax.Array = jax.shard_map(
        attend,
        mesh=layout.mesh,
        in_specs=specs[: len(given)],
        out_specs=queries,
        check_vma=False,  # kernels do not say over which axes they vary
    )(*given)
    return mixed


def splash_attention(
    q: RowQueries,
    k: RowKeys,
    v: RowKeys,
    window: int | None,
    segments: Segments | None = None,
    *,
    interpret: bool = False,
) -> RowQueries:
    """Causal attention within each row of one device, or each segment of it, by JAX's splash."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        LocalMask,
        MultiHeadMask,
        SegmentIds,
        make_splash_mha,
    )

    length = q.shape[1]
    square = (length, length)
    # Its window counts the keys before the query, Mistral's includes the query itself.
    mask = CausalMask(square) if window is None else LocalMask(square, (window - 1, 0), 0)
    size = largest_tile(length, 512)
    sizes = BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    attend = make_splash_mha(
        MultiHeadMask([mask] * q.shape[2]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    ids = None if segments is None else SegmentIds(segments, segments)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        mixed: jax.Array = jax.vmap(attend)(*heads_first, ids)
    return jnp.swapaxes(mixed, 1, 2)
