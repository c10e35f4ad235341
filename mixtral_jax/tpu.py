"""Kernels for TPU, from JAX's own collection, in the forms that the serving step needs.

Each has an equal XLA form beside it (attention.py, moe.py), which is taken where a kernel's limits
are not met. Sizes of blocks are always given: left out, the kernels would ask the default device,
which is another one where programs are compiled for hardware that is elsewhere.
"""

import jax
import jax.numpy as jnp

from mixtral_jax import cache
from mixtral_jax.axes import FlatKeys, FlatQueries, Pages
from mixtral_jax.cache import RaggedBatch
from mixtral_jax.layers import Scaled

_KEYS_PER_BLOCK = 512
_QUERIES_PER_BLOCK = 64
_VMEM = 64 << 20  # of 128 MiB, which v5e, v5p and v6e have
_LANES = 128


def fits_attention(pages: Pages) -> bool:
    """Whether the kernel takes such pages: heads fill whole tiles."""
    packed = pages.shape[2] * pages.dtype.itemsize // 4
    is_tiled = packed in (1, 2, 4) or (packed > 0 and packed % 8 == 0)
    floats = pages.dtype in (jnp.bfloat16, jnp.float32)
    return floats and is_tiled and pages.shape[3] % _LANES == 0


def write_and_attend(
    q: FlatQueries,
    k: FlatKeys,
    v: FlatKeys,
    pages: Pages,
    batch: RaggedBatch,
    window: int | None,
) -> tuple[FlatQueries, Pages]:
    """`cache.write`, then ragged paged attention.

    Its window counts the query itself, as Mistral's does.
    """
    # Imported where it is used: it takes a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    pages = cache.write(pages, k, v, batch)
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
            num_kv_pages_per_block=min(table_width, max(1, _KEYS_PER_BLOCK // page_size)),
            num_queries_per_block=min(q.shape[0], _QUERIES_PER_BLOCK),
            vmem_limit_bytes=_VMEM,
        )
    return mixed, pages


def fits_grouped(x: jax.Array, weight: Scaled) -> bool:
    """Whether the kernel takes such rows and weights: floats, in whole tiles.

    int8 is left to XLA's ragged product, which is native on TPU, but transposes the weights first:
    a step of many tokens reads them twice more for it.
    """
    outputs, inputs = weight.values.shape[1:]
    return weight.scale is None and outputs % _LANES == 0 == inputs % _LANES


def grouped(
    x: jax.Array, sizes: jax.Array, weight: Scaled, *, interpret: bool = False
) -> jax.Array:
    """`moe.grouped_xla` of floats by megablox, which reads weights [E O I] as they lie."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    padded = jnp.pad(x, ((0, -x.shape[0] % _LANES), (0, 0)))
    _, outputs, inputs = weight.values.shape
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        total: jax.Array = gmm(
            padded,
            weight.values,
            sizes.astype(jnp.int32),
            preferred_element_type=jnp.float32,
            tiling=(_tile(padded.shape[0], 512), _tile(inputs, 1024), _tile(outputs, 1024)),
            transpose_rhs=True,
            interpret=interpret,
        )
    return total[: x.shape[0]].astype(x.dtype)


def _tile(size: int, most: int) -> int:
    """The largest that divides evenly."""
    return next(tile for tile in range(most, 0, -_LANES) if size % tile == 0)
