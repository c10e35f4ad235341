"""Attention on CPU over pages, by the kernel of attention.cc."""

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.axes import FlatKeys, FlatQueries, Pages
from mixtral_jax.cache import RaggedBatch
from mixtral_jax.kernels.no_gradient import without_gradient
from mixtral_jax.kernels.xla import attention as xla

LANES = 8  # heads are multiples of it


def attend(
    q: FlatQueries,
    k: FlatKeys,
    v: FlatKeys,
    pages: Pages,
    batch: RaggedBatch,
    window: int | None,
) -> tuple[FlatQueries, Pages]:
    """`xla.attend`, with the pages written in place: q [T N H], k and v [T K H] f32.

    Unused places of the batch give zeros. Heads that are no multiple of LANES, and other dtypes
    than float32 (and int8 pages), are computed by XLA.
    """
    q, k, v = (without_gradient("paged attention (attend)", x) for x in (q, k, v))
    fits = q.dtype == jnp.float32 and q.shape[-1] % LANES == 0
    if not fits or pages.dtype not in (jnp.float32, jnp.int8):
        return xla.attend(q, k, v, pages, batch, window)
    shapes = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct(pages.shape, pages.dtype),
    )
    call = jax.ffi.ffi_call("mixtral_jax_paged", shapes, input_output_aliases={3: 1})
    where = (batch.lengths, batch.query_starts, batch.page_table, batch.num_sequences)
    mixed, pages = call(q, k, v, pages, *where, window=np.int64(window or 0))
    return mixed, pages
