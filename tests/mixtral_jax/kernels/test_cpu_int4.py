"""The int4 kernel has the bits of a loop in numpy, whatever is beside a row, in every form."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.cpu import build, forms, products
from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.weight import GROUP_SIZE, Weight, unpacked

pytestmark = pytest.mark.skipif(
    not build.available(), reason="no C++ compiler: the kernels are not used on this machine"
)
# Outputs and inputs that fill the registers and panels, and that leave something over.
SHAPES = [(1, 32), (5, 64), (70, 160), (33, 576), (36, 4128)]
MANY = 33  # rows, which take the form for many of them


def case(rows: int, outputs: int, inputs: int) -> tuple[jax.Array, Weight]:
    x = jax.random.normal(jax.random.key(0), (rows, inputs))
    return x, Weight.quantized(jax.random.normal(jax.random.key(1), (outputs, inputs)), "int4")


def by_loops(x: jax.Array, weight: Weight) -> np.ndarray:
    """The slow twin, every operation of float32 rounded by itself."""
    assert weight.scale is not None
    row_scale = np.max(np.abs(x), axis=1) / np.float32(127)
    rows = np.rint(np.asarray(x) * (np.float32(1) / row_scale)[:, None])
    levels, pairs = np.asarray(unpacked(weight.values)), np.asarray(weight.scale, np.float32)
    total = np.zeros((len(rows), len(levels)), np.float32)
    for group in range(pairs.shape[1]):
        own = np.s_[:, group * GROUP_SIZE : (group + 1) * GROUP_SIZE]
        row, level = rows[own].astype(np.int32), levels[own].astype(np.int32)
        dots = (row @ level.T).astype(np.float32)
        sums = row.sum(axis=1).astype(np.float32)[:, None]
        total += dots * pairs[:, group, 0] + sums * pairs[:, group, 1]
    return np.asarray(total * row_scale[:, None])


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 12, MANY])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_linear_has_the_bits_of_the_loop(rows: int, outputs: int, inputs: int) -> None:
    x, weight = case(rows, outputs, inputs)
    first, second = jax.jit(lambda: products.linear(x, [weight, weight]))()
    np.testing.assert_array_equal(first, by_loops(x, weight))
    np.testing.assert_array_equal(second, first)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_linear_is_near_xlas_form(outputs: int, inputs: int) -> None:
    x, weight = case(3, outputs, inputs)
    (got,) = products.linear(x, [weight])
    np.testing.assert_allclose(got, xla.product(x, weight), rtol=1e-5, atol=1e-4)


def test_groups_have_the_bits_of_their_own_experts() -> None:
    x, _ = case(40, 1, 96)
    experts = Weight.quantized(jax.random.normal(jax.random.key(1), (3, 37, 96)), "int4")
    assert experts.scale is not None
    got = products.grouped(x, jnp.asarray([5, 0, 30]), experts)
    for expert, own in ((0, slice(0, 5)), (2, slice(5, 35))):
        alone = Weight(experts.values[expert], experts.scale[expert])
        np.testing.assert_array_equal(got[own], by_loops(x[own], alone))
    assert not got[35:].any()


@pytest.mark.parametrize("number", [1, 0.5, 6.1e-5, 6e-8, 65504, -2.5e-7, 0])
def test_every_float16_is_read_exactly(number: float) -> None:
    """A row of ones and levels of 1: 32 times scale and 32 times minimum, small numbers too."""
    values = jnp.full((1, GROUP_SIZE // 2), 0x11, jnp.uint8)
    wanted = np.float32(np.float16(number))
    for pair, factor in (((number, 0), 127), ((0, number), 127)):
        weight = Weight(values, jnp.asarray([[pair]], jnp.float16))
        (got,) = products.linear(jnp.full((1, GROUP_SIZE), 127.0), [weight])
        assert float(got[0, 0]) == np.float32(GROUP_SIZE * factor) * wanted


def test_gradients_are_those_of_the_widened_weight() -> None:
    x, weight = case(4, 24, 64)
    slope = jax.random.normal(jax.random.key(2), (4, 24))

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(products.linear(x, [weight])[0] * slope)

    np.testing.assert_allclose(jax.grad(loss)(x), slope @ weight.widened(jnp.float32), atol=1e-4)
    experts = Weight.quantized(jax.random.normal(jax.random.key(1), (2, 24, 64)), "int4")
    sizes = jnp.asarray([1, 2], jnp.int32)
    dx = jax.grad(lambda x: jnp.sum(products.grouped(x, sizes, experts) * slope))(x)
    wide = experts.widened(jnp.float32)
    want = jnp.stack([slope[0] @ wide[0], slope[1] @ wide[1], slope[2] @ wide[1], jnp.zeros(64)])
    np.testing.assert_allclose(dx, want, atol=1e-4)


@pytest.mark.soak  # each form is compiled for a minute
@pytest.mark.parametrize("form", forms.forms_of(), ids=lambda form: form.name)
def test_every_form_has_these_bits(form: forms.Form) -> None:
    environment = {**os.environ, "MIXTRAL_JAX_ISA": form.name}
    ask = "from mixtral_jax.kernels.cpu import build; build.available()"
    if subprocess.run([sys.executable, "-c", ask], env=environment, check=False).returncode:
        pytest.skip(f"this machine does not run {form.name}")
    test = f"{__file__}::{test_linear_has_the_bits_of_the_loop.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    subprocess.run(command, env=environment, cwd=Path(__file__).parents[3], check=True)
