"""Kernels for TPU against their XLA forms: by interpreting them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.tpu import attention as tpu
from mixtral_jax.kernels.tpu import products
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
    want = grouped_xla(x, jnp.asarray(sizes, jnp.int32), weight)
    got = products.grouped(x, jnp.asarray(sizes, jnp.int32), weight, interpret=True)
    used = sum(sizes)
    np.testing.assert_allclose(got[:used], want[:used], rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [None, 100])
def test_full_attention(window: int | None) -> None:
    """And its gradients."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (2, 256, heads, 128))
        for key, heads in zip(keys, (4, 2, 2), strict=True)
    )
    assert tpu._fits_rows(q)
    assert not tpu._fits_rows(q[:, :250])

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return tpu.splash_attention(q, k, v, window, interpret=True)

    def xla(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        before = None if window is None else (window - 1, 0)
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=before)

    def summed(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda *given: jnp.sum(jnp.sin(attend(*given)))

    np.testing.assert_allclose(kernel(q, k, v), xla(q, k, v), rtol=0, atol=2e-5)
    for got, want in zip(
        jax.grad(summed(kernel), argnums=(0, 1, 2))(q, k, v),
        jax.grad(summed(xla), argnums=(0, 1, 2))(q, k, v),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)
