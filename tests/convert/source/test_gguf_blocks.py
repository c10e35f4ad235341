"""GGUF's blocks have the numbers that the package gguf decodes them to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from convert.source import gguf_blocks
from mixtral_jax.kernels.cpu import build
from mixtral_jax.kernels.cpu import products as cpu
from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.weight import GROUP_SIZE, INT8_GROUP_SIZE, Weight, unpacked
from tests.support import group_loops
from tests.support.gguf_files import floats, random_blocks

OF_FOUR_BITS = [Q.Q4_0, Q.Q4_1, Q.Q4_K]
OF_GROUPS = [Q.Q8_0, Q.Q6_K]


def weight_of(blocks: np.ndarray, kind: Q) -> Weight:
    if kind in OF_FOUR_BITS:
        halves = gguf_blocks.halves(blocks, kind.name)
        return Weight(jnp.asarray(halves), jnp.asarray(gguf_blocks.pairs(blocks, kind.name)))
    values = jnp.asarray(gguf_blocks.values(blocks, kind.name))
    return Weight(values, jnp.asarray(gguf_blocks.scales(blocks, kind.name)))


@pytest.mark.parametrize("kind", OF_FOUR_BITS + OF_GROUPS)
def test_weights_are_those_that_the_package_decodes(kind: Q) -> None:
    """Exactly, but the products of scales of Q4_K and Q6_K, of which float16 keeps eleven bits."""
    blocks = random_blocks(np.random.default_rng(1), kind, 9, 768)
    weight, want = weight_of(blocks, kind), floats(blocks, kind)
    got = np.asarray(weight.widened(jnp.float32))
    if kind == Q.Q4_K:
        pairs = np.asarray(weight.scale, np.float32)
        scale, minimum = (np.repeat(pairs[..., i], GROUP_SIZE, -1) for i in range(2))
        parts = np.abs(np.asarray(unpacked(weight.values)) * scale) + np.abs(minimum)
        assert (np.abs(got - want) <= parts * 2.0**-11).all()
        assert (got != want).any()
    elif kind == Q.Q6_K:
        # Scales below 2^-14 have fewer bits, in steps of 2^-24.
        off = np.maximum(np.abs(want) * 2.0**-11, np.abs(weight.values) * 2.0**-25)
        assert (np.abs(got - want) <= off).all()
        assert (got != want).any()
    else:
        np.testing.assert_array_equal(got, want)


def test_a_block_by_hand() -> None:
    """Q4_0 with d = 0.5: byte j is 16 j + 15 - j, so weights 0 .. 15 fall and 16 .. 31 rise."""
    octets = [16 * j + 15 - j for j in range(16)]
    blocks = np.asarray([[*np.float16(0.5).tobytes(), *octets]], np.uint8)
    weight = weight_of(blocks, Q.Q4_0)
    levels = [*range(15, -1, -1), *range(16)]
    np.testing.assert_array_equal(unpacked(weight.values)[0], levels)
    np.testing.assert_array_equal(weight.scale, [[[0.5, -4.0]]])
    np.testing.assert_array_equal(weight.widened(jnp.float32)[0], (np.array(levels) - 8) * 0.5)


@pytest.mark.parametrize("kind", OF_GROUPS)
def test_products_in_groups_have_the_bits_of_the_loop(kind: Q) -> None:
    """Likewise."""
    blocks = random_blocks(np.random.default_rng(2), kind, 16, 512)
    weight, wide = weight_of(blocks, kind), floats(blocks, kind)
    scales = np.asarray(weight.scale, np.float32)
    scale = np.repeat(scales, INT8_GROUP_SIZE, -1)
    values = np.rint(np.divide(wide, scale, where=scale != 0, out=np.zeros_like(wide)))
    x = jax.random.normal(jax.random.key(0), (5, 512)).at[:, ::37].multiply(20.0)
    want = group_loops.product(np.asarray(x), values, scales)
    if build.available():
        np.testing.assert_array_equal(cpu.linear(x, [weight])[0], want)
    np.testing.assert_allclose(xla.product(x, weight), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", OF_FOUR_BITS)
def test_products_have_the_bits_of_the_loop(kind: Q) -> None:
    """The levels of the loop come from the floats that the package gguf decodes, not from ours."""
    blocks = random_blocks(np.random.default_rng(2), kind, 16, 512)
    weight, wide = weight_of(blocks, kind), floats(blocks, kind)
    pairs = np.asarray(weight.scale, np.float32)
    scale, minimum = (np.repeat(pairs[..., i], GROUP_SIZE, -1) for i in range(2))
    levels = np.rint(np.divide(wide - minimum, scale, where=scale != 0, out=np.zeros_like(wide)))
    x = jax.random.normal(jax.random.key(0), (5, 512)).at[:, ::37].multiply(20.0)
    want = group_loops.product(np.asarray(x), levels, pairs)
    if build.available():
        np.testing.assert_array_equal(cpu.linear(x, [weight])[0], want)
    np.testing.assert_allclose(xla.product(x, weight), want, rtol=1e-5, atol=1e-5)
