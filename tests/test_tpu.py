"""Kernels for TPU against their XLA forms: by interpreting them, or by their reference on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax import tpu
from mixtral_jax.layers import Scaled
from mixtral_jax.moe import grouped_xla


@pytest.mark.parametrize("sizes", [[70, 0, 58], [5, 100, 6]])
def test_grouped(sizes: list[int]) -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (130, 128))
    weight = Scaled(jax.random.normal(keys[1], (3, 256, 128)), None)
    assert tpu.fits_grouped(x, weight)
    want = grouped_xla(x, jnp.asarray(sizes, jnp.int32), weight)
    got = tpu.grouped(x, jnp.asarray(sizes, jnp.int32), weight, interpret=True)
    used = sum(sizes)
    np.testing.assert_allclose(got[:used], want[:used], rtol=0, atol=1e-4)
