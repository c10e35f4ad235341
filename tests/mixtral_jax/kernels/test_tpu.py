"""Splash attention's limits and gradients: test_makers.py holds the values of every kernel."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.tpu import attention as tpu


@pytest.mark.slow
@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.soak), 100])
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
