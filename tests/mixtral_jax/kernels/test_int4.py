"""Kernels for int4 weights that widen them on the chip, beside XLA's form, and their gradients."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import Kernels, kernels_for, kernels_for_device
from mixtral_jax.kernels.gpu import few_rows
from mixtral_jax.kernels.gpu.triton import int4
from mixtral_jax.kernels.tpu.int4 import float_of_half
from mixtral_jax.weight import Weight, packed

XLA = kernels_for("xla")


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.device(name)) for name in ("gpu", "tpu")]
)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    device = jax.devices()[0]
    is_here = device.platform == request.param
    return kernels_for_device(device) if is_here else kernels_for(request.param)


@pytest.fixture
def run(kernels: Kernels, interpret: bool) -> Callable[..., Any]:
    """Calls a function of the record by its name, interpreted if its device is not there."""

    def call(name: str, *given: Any) -> Any:
        function = getattr(kernels, name)
        if interpret and "interpret" in inspect.signature(function).parameters:
            function = partial(function, interpret=True)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return jax.jit(function)(*given)

    return call


def rows_of(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)


def weight(seed: int, *shape: int) -> Weight:
    """Random bits: every level, and scales and minima of both signs."""
    keys = jax.random.split(jax.random.key(seed))
    *outputs, inputs = shape
    values = jax.random.bits(keys[0], (*outputs, inputs // 2), jnp.uint8)
    pairs = jax.random.normal(keys[1], (*outputs, inputs // 32, 2))
    return Weight(values, pairs.astype(jnp.float16))


def close(got: jax.Array, want: jax.Array) -> None:
    """Equal up to the last bit of bfloat16, and to what sums of other order differ by."""
    a, b = (np.asarray(array, np.float32) for array in (got, want))
    np.testing.assert_allclose(a, b, rtol=2**-7, atol=2e-3 * float(np.abs(b).max()))


def test_words_and_planes_by_hand() -> None:
    """Inputs 0 .. 15 twice have the levels of their place; their scale is 2, their minimum -3."""
    levels = jnp.tile(jnp.arange(16, dtype=jnp.uint8), 2)[None, None]
    pairs = jnp.asarray([[[[2.0, -3.0]]]], jnp.float16)
    words, of_groups = int4.words_of(Weight(packed(levels), pairs))
    assert [hex(word) for word in words[0, 0].tolist()] == ["0x76543210", "0xfedcba98"] * 2
    scale, base = int4.scale_and_base(of_groups)
    for plane in range(8):
        raised = int4.raised_level(words, plane)
        np.testing.assert_array_equal(raised[0, 0], [16.0 + plane, 24.0 + plane] * 2)
        np.testing.assert_array_equal((raised * scale + base)[0, 0, 0], 2.0 * plane - 3)
    planes = int4.planes_of(jnp.arange(32.0)[None])
    np.testing.assert_array_equal(planes[0, 12:16], [3, 11, 19, 27])


def test_every_finite_float16_by_its_bits() -> None:
    """The smallest too, which have no leading one: 2^-24 has the bits 1."""
    bits = np.arange(2**16)
    finite = bits[(bits & 0x7C00) != 0x7C00]
    got = float_of_half(jnp.asarray(finite, jnp.int32))
    want = finite.astype(np.uint16).view(np.float16).astype(np.float32)
    assert got[1] == 2.0**-24
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 128, 4096), (20, 128, 4608), (70, 256, 256)]
)
def test_linear(run: Callable[..., Any], rows: int, outputs: int, inputs: int) -> None:
    """Fewer rows than a tile and more; one step along the inputs, several, and parts of them.

    On TPU 4,096 inputs have their groups along registers, and 4,608 are two tiles.
    """
    x, weights = rows_of(0, rows, inputs), [weight(1, outputs, inputs)]
    for got, want in zip(run("linear", x, weights), XLA.linear(x, weights), strict=True):
        close(got, want)


@pytest.mark.parametrize(("rows", "sizes"), [(2, [0, 1, 1]), (40, [17, 0, 20]), (150, [70, 0, 66])])
def test_grouped(run: Callable[..., Any], rows: int, sizes: list[int]) -> None:
    """Groups that are empty or end within a tile; nothing of an expert without rows is seen."""
    x, (values, pairs) = rows_of(0, rows, 512), weight(1, 3, 128, 512)
    assert pairs is not None
    groups, used = jnp.asarray(sizes, jnp.int32), sum(sizes)
    want = XLA.grouped(x, groups, Weight(values, pairs))
    unused = (groups == 0).reshape(-1, 1, 1, 1)
    got = run("grouped", x, groups, Weight(values, jnp.where(unused, jnp.nan, pairs)))
    close(got[:used], want[:used])


@pytest.mark.parametrize(("rows", "sizes"), [(2, [0, 1, 1]), (20, [17, 0, 2])])
def test_few_rows_as_sums(rows: int, sizes: list[int]) -> None:
    """The form of cards without a kernel: row by row, of a lone weight and of experts."""
    x, experts = rows_of(0, rows, 256), weight(1, 3, 96, 256)
    groups, used = jnp.asarray(sizes, jnp.int32), sum(sizes)
    got = few_rows.tiles_of(x, groups, experts, False)
    close(got[:used], XLA.grouped(x, groups, experts)[:used])
    (alone,) = few_rows.linear(x[:3], [weight(2, 96, 256)])
    close(alone, XLA.linear(x[:3], [weight(2, 96, 256)])[0])


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 12), reason="jax 0.12 has no kernel for GPU: rows are counted there"
)
def test_each_expert_with_rows_is_read_once(kernels: Kernels) -> None:
    experts = jax.ShapeDtypeStruct((8, 128, 128), jnp.uint8)
    assert kernels.expert_reads([0, 2, 0, 1, 0, 0, 0, 5], 8, experts) == 3
    thin = jax.ShapeDtypeStruct((8, 100, 128), jnp.uint8)
    assert kernels.expert_reads([0, 2, 0, 1, 0, 0, 0, 5], 8, thin) == 8  # by XLA


@pytest.mark.parametrize("name", ["linear", "grouped"])
def test_gradients_are_those_of_widened_weights(
    run: Callable[..., Any], kernels: Kernels, name: str
) -> None:
    """Of rows, scales and minima; rows behind the last group have none."""
    x, (values, pairs) = rows_of(0, 7, 128), weight(1, 3, 128, 128)
    assert pairs is not None
    sizes = jnp.asarray([4, 0, 2], jnp.int32)
    slope = rows_of(2, 7, 128).at[6].set(jnp.nan if name == "grouped" else 1)

    def product(function: Callable[..., Any], x: jax.Array, pairs: jax.Array) -> jax.Array:
        if name == "linear":
            return function(name, x, [Weight(values[0], pairs[0])])[0]
        return function(name, x, sizes, Weight(values, pairs))

    def oracle(name: str, *given: Any) -> Any:
        return getattr(XLA, name)(*given)

    assert name in kernels.differentiable
    # Rows of float32 have XLA's gradient as if they were floats, which that of bfloat16 rounds.
    wide = [array.astype(jnp.float32) for array in (x, slope)]
    want = jax.jit(lambda *g: jax.vjp(partial(product, oracle), *g[:2])[1](g[2]))(
        wide[0], pairs, wide[1]
    )
    got = jax.jit(lambda *g: jax.vjp(partial(product, run), *g[:2])[1](g[2]))(x, pairs, slope)
    for ours, theirs in zip(got, want, strict=True):
        a, b = (np.asarray(array, np.float32) for array in (ours, theirs))
        np.testing.assert_allclose(a, b, rtol=0, atol=0.02 * float(np.abs(b).max()))
