"""Kernels for GPU against their XLA forms, by interpreting them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.cache import RaggedBatch
from mixtral_jax.kernels.gpu import attention as gpu
from mixtral_jax.kernels.gpu import products
from mixtral_jax.kernels.xla import attention as xla_attention
from mixtral_jax.kernels.xla.products import grouped as grouped_xla
from mixtral_jax.weight import Weight


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("sizes", [[70, 0, 58], [5, 100, 6]])
def test_grouped(sizes: list[int], dtype: str) -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (130, 128))
    values = jax.random.normal(keys[1], (3, 256, 128))
    weight = Weight.quantized(values) if dtype == "int8" else Weight(values, None)
    assert products._fits(weight)
    groups = jnp.asarray(sizes, jnp.int32)
    want = grouped_xla(x, groups, weight)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got = products.grouped(x, groups, weight, interpret=True)
    used = sum(sizes)
    np.testing.assert_allclose(got[:used], want[:used], rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [None, 40])
def test_decode(window: int | None) -> None:
    """Lengths within a page, at a block's end and over many splits; unused pages hold NaN."""
    page_size, kv_heads, group, size, width = 16, 2, 3, 32, 50
    lengths = jnp.asarray([1, 16, 64, 65, 790, 0], jnp.int32)
    first = jnp.zeros_like(lengths) if window is None else lengths - window
    keys = jax.random.split(jax.random.key(1), 3)
    table = jax.random.permutation(keys[0], 6 * width).reshape(6, width).astype(jnp.int32)
    pages = jax.random.normal(keys[1], (6 * width, page_size, 2 * kv_heads, size))
    q = jax.random.normal(keys[2], (6, kv_heads * group, size))
    want = np.zeros((6, kv_heads * group, size), np.float32)
    seen = np.zeros((6 * width, page_size), bool)
    for row, (start, end) in enumerate(zip(np.maximum(first, 0), np.asarray(lengths), strict=True)):
        places = np.arange(start, end)
        index = table[row, places // page_size], places % page_size
        seen[index] = True
        held = np.asarray(pages)[index]
        for head in range(kv_heads * group):
            kv = head // group
            scores = held[:, 2 * kv] @ q[row, head] / np.sqrt(size)
            if len(places):
                weights = np.exp(scores - scores.max())
                want[row, head] = weights @ held[:, 2 * kv + 1] / weights.sum()
    pages = jnp.where(seen[:, :, None, None], pages, jnp.nan)
    assert gpu.fits(pages)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got = gpu.decode(q, pages, table, first, lengths, interpret=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("group", "window"), [(1, None), (3, 40)])
def test_paged_attention(group: int, window: int | None) -> None:
    """Two decodes, prompts within a tile, of a tile and beyond, after tokens and without; unused
    pages and places hold NaN."""
    page_size, kv_heads, size, width = 16, 2, 32, 30
    lengths = jnp.asarray([5, 300, 70, 128, 450, 7, 0], jnp.int32)
    starts = jnp.asarray([0, 1, 2, 33, 161, 400, 407, 407], jnp.int32)
    rows, tokens = lengths.shape[0], 420
    keys = jax.random.split(jax.random.key(2), 3)
    table = jax.random.permutation(keys[0], rows * width).reshape(rows, width).astype(jnp.int32)
    unused = jnp.zeros(tokens, jnp.int32)
    batch = RaggedBatch(
        tokens=unused,
        positions=unused,
        lengths=lengths,
        query_starts=starts,
        page_table=table,
        num_decodes=jnp.asarray(2, jnp.int32),
        num_sequences=jnp.asarray(6, jnp.int32),
    )
    position = np.arange(width * page_size)
    written = np.zeros((rows * width, page_size), bool)
    for row in range(rows):
        places = position[: lengths[row]]
        written[table[row, places // page_size], places % page_size] = True
    pages = jax.random.normal(keys[1], (rows * width, page_size, 2 * kv_heads, size))
    pages = jnp.where(written[:, :, None, None], pages, jnp.nan)
    q = jax.random.normal(keys[2], (tokens, kv_heads * group, size))
    q = jnp.where((jnp.arange(tokens) < 407)[:, None, None], q, jnp.nan)
    want = xla_attention.paged_attention(q, pages, batch, window)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got = gpu.paged_attention(q, pages, batch, window, interpret=True)
    np.testing.assert_allclose(got[:407], want[:407], rtol=0, atol=2e-5)
    assert not jnp.isnan(want[:407]).any() and not got[407:].any()
