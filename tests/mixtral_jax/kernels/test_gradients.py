"""Gradients of the makers' functions: by hand, against XLA's, and int8 against floats."""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.xla import attention, blockwise
from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.weight import Weight


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_the_gradient_of_int8_passes_straight_through_the_rounding() -> None:
    """Of y = x @ (values * scale)^T with the slopes 1 and 2: 1 * 3 * 0.5 + 2 * 7 * 0.25 = 5."""
    weight = Weight(jnp.asarray([[3, -1], [7, 0]], jnp.int8), jnp.asarray([0.5, 0.25]))
    slopes = jnp.asarray([[1.0, 2.0]])
    x = jnp.asarray([[0.3, -0.2]])
    dx = jax.grad(lambda x: jnp.sum(xla.product(x, weight) * slopes))(x)
    np.testing.assert_allclose(dx, [[5.0, -0.5]], rtol=1e-6)


def test_the_gradient_of_scales_is_that_of_the_rounded_product() -> None:
    """y is linear in the scales, so their gradient is dy * y / scale, summed over the rows."""
    weight, x = Weight.quantized(normal(0, 5, 16)), normal(1, 3, 16)
    slopes = normal(2, 3, 5)

    def loss(scale: jax.Array) -> jax.Array:
        return jnp.sum(xla.product(x, Weight(weight.values, scale)) * slopes)

    assert weight.scale is not None
    want = jnp.sum(slopes * xla.product(x, weight), axis=0) / weight.scale
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(weight.scale), want, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grouped_int8_has_the_gradient_of_each_expert_alone(dtype: str) -> None:
    """An expert without rows, and rows behind the last group, which have none."""
    weight = Weight.quantized(normal(0, 3, 8, 16))
    x, slopes = normal(1, 9, 16).astype(dtype), normal(2, 9, 8).astype(dtype)
    sizes = jnp.asarray([4, 0, 3])
    assert weight.scale is not None

    def loss(x: jax.Array, scale: jax.Array) -> jax.Array:
        y = xla.grouped(x, sizes, Weight(weight.values, scale))
        return jnp.sum((y * slopes)[:7].astype(jnp.float32))

    def one_by_one(x: jax.Array, scale: jax.Array) -> jax.Array:
        first, last = (Weight(weight.values[e], scale[e]) for e in (0, 2))
        y = jnp.concatenate([xla.product(x[:4], first), xla.product(x[4:7], last)])
        return jnp.sum((y * slopes[:7]).astype(jnp.float32))

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, weight.scale) for f in (loss, one_by_one))
    for a, b in zip(got, want, strict=True):
        a, b = (np.asarray(array, np.float32) for array in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=1e-5)
    assert not np.any(np.asarray(got[0], np.float32)[7:])


@pytest.mark.parametrize(("length", "window"), [(100, None), (70, 5), (64, 23)])
@pytest.mark.parametrize("is_packed", [False, True])
def test_attention_block_by_block_has_the_oracles_gradient(
    length: int, window: int | None, is_packed: bool
) -> None:
    """Lengths that are no multiple of a block, documents that end within one; all of q, k and v."""
    heads = [normal(seed, 2, length, n, 8) for seed, n in ((0, 6), (1, 2), (2, 2))]
    slope = normal(3, 2, length, 6, 8)
    ids = np.sort(np.random.default_rng(0).integers(0, 4, (2, length)), axis=1)
    segments = jnp.asarray(ids, jnp.int32) if is_packed else None

    def both(function: Any) -> Any:
        def run(*heads: jax.Array) -> Any:
            out, back = jax.vjp(lambda *x: function(*x, window, None, segments), *heads)
            return out, *back(slope)

        return jax.jit(run)(*heads)

    got = both(partial(blockwise.full_attention, block=16))
    for a, b in zip(got, both(attention.full_attention), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_attention_of_long_rows_holds_no_scores_of_all_keys() -> None:
    """2048 queries by 2048 keys of one head: no array of the gradient's program is so large."""
    heads = [jax.ShapeDtypeStruct((1, 2048, 1, 8), jnp.float32)] * 3

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(blockwise.full_attention(q, k, v, None, None))

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*heads))
    sizes = [
        math.prod(int(size) for size in shape.split(","))
        for shape in re.findall(r"(?:f32|bool)\[([\d,]+)\]", text)
    ]
    assert 256 * 256 <= max(sizes) < 2048 * 256
