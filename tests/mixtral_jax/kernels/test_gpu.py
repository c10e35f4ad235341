"""Paged decode on GPU by hand: test_makers.py holds the other kernels against XLA's forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.gpu import attention as gpu


@pytest.mark.slow
@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.soak), 40])
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
