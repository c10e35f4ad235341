"""The kernels for int4 and int8x16 have the bits of a loop in numpy, in every form."""

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
from mixtral_jax.weight import GROUP_SIZE, INT8_GROUPS, Weight
from tests.support.group_loops import by_loops

pytestmark = pytest.mark.skipif(
    not build.available(), reason="no C++ compiler: the kernels are not used on this machine"
)
DTYPES = ["int4", INT8_GROUPS]
# Whole tiles, and outputs that are none, which XLA's form computes; few inputs and many.
SHAPES = [(16, 32), (48, 576), (80, 160), (32, 4128), (5, 64)]
# Every number of rows that is computed together, and more of them.
ROWS = [1, 2, 3, 7, 12, 33]


def case(rows: int, outputs: int, inputs: int, dtype: str) -> tuple[jax.Array, Weight]:
    """Rows whose groups are of very different sizes, and a weight with the ends of its range."""
    x = jax.random.normal(jax.random.key(0), (rows, inputs)).at[:, ::37].multiply(50.0)
    weight = Weight.quantized(jax.random.normal(jax.random.key(1), (outputs, inputs)), dtype)
    end = jnp.uint8(255) if dtype == "int4" else jnp.int8(-128)
    return x, weight._replace(values=weight.values.at[0, ::5].set(end))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES[:-1])
def test_linear_has_the_bits_of_the_loop(outputs: int, inputs: int, dtype: str) -> None:
    x, weight = case(max(ROWS), outputs, inputs, dtype)
    both = [weight, weight.in_tiles()]
    want = by_loops(x, weight)
    by_rows = jax.jit(lambda: [products.linear(x[:rows], both) for rows in ROWS])()
    for rows, (first, second) in zip(ROWS, by_rows, strict=True):
        np.testing.assert_array_equal(first, want[:rows])
        np.testing.assert_array_equal(second, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_linear_is_near_xlas_form(outputs: int, inputs: int, dtype: str) -> None:
    x, weight = case(3, outputs, inputs, dtype)
    both = [weight, weight.in_tiles()]
    kernels, forms = jax.jit(lambda: (products.linear(x, both), xla.linear(x, both)))()
    for got, want in zip(kernels, forms, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_have_the_bits_of_their_own_experts(dtype: str) -> None:
    x, _ = case(40, 16, 96, dtype)
    normal = jax.random.normal(jax.random.key(1), (3, 48, 96))
    experts, sizes = Weight.quantized(normal, dtype), jnp.asarray([5, 0, 30])
    assert experts.scale is not None
    got = products.grouped(x, sizes, experts)
    np.testing.assert_array_equal(products.grouped(x, sizes, experts.in_tiles()), got)
    for expert, own in ((0, slice(0, 5)), (2, slice(5, 35))):
        alone = Weight(experts.values[expert], experts.scale[expert])
        np.testing.assert_array_equal(got[own], by_loops(x[own], alone))
    assert not got[35:].any()
    want = xla.grouped(x, sizes, experts.in_tiles())
    np.testing.assert_allclose(got[:35], want[:35], rtol=1e-5, atol=1e-3)


def test_weights_of_all_kinds_meet_the_same_rows() -> None:
    """The products of a layer whose weights have dtypes of their own."""
    x, in_groups = case(3, 48, 64, INT8_GROUPS)
    normal = jax.random.normal(jax.random.key(2), (32, 64))
    weights = [in_groups, *(Weight.quantized(normal, dtype) for dtype in ("int4", "int8"))]
    weights.append(in_groups)
    for got, weight in zip(products.linear(x, weights), weights, strict=True):
        np.testing.assert_array_equal(got, products.linear(x, [weight])[0])


@pytest.mark.parametrize("number", [1, 0.5, 6.1e-5, 6e-8, 65504, -2.5e-7, 0])
def test_every_float16_is_read_exactly(number: float) -> None:
    """A row of ones and levels of 1: 32 times scale and 32 times minimum, small numbers too."""
    values = jnp.full((16, GROUP_SIZE // 2), 0x11, jnp.uint8)
    wanted = np.float32(np.float16(number))
    for pair, factor in (((number, 0), 127), ((0, number), 127)):
        weight = Weight(values, jnp.asarray([[pair]] * 16, jnp.float16))
        (got,) = products.linear(jnp.full((1, GROUP_SIZE), 127.0), [weight])
        np.testing.assert_array_equal(got, np.full((1, 16), np.float32(32 * factor) * wanted))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_widened_weight(dtype: str) -> None:
    x = jax.random.normal(jax.random.key(0), (4, 64))
    _, weight = case(4, 16, 64, dtype)
    slope = jax.random.normal(jax.random.key(2), (4, 16))

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(products.linear(x, [weight])[0] * slope)

    np.testing.assert_allclose(jax.grad(loss)(x), slope @ weight.widened(jnp.float32), atol=1e-3)
    experts = Weight.quantized(jax.random.normal(jax.random.key(1), (2, 16, 64)), dtype)
    sizes = jnp.asarray([1, 2], jnp.int32)
    wide = experts.widened(jnp.float32)
    for same in (experts, experts.in_tiles()):
        dx = jax.grad(lambda x, w=same: jnp.sum(products.grouped(x, sizes, w) * slope))(x)
        want = jnp.stack([slope[0] @ wide[0], slope[1] @ wide[1], slope[2] @ wide[1], dx[3] * 0])
        np.testing.assert_allclose(dx, want, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_scales_is_in_their_order(dtype: str) -> None:
    """A weight may be trained by its scales whichever way it lies."""
    x, weight = case(4, 32, 64, dtype)

    def loss(weight: Weight) -> jax.Array:
        return jnp.sum(products.linear(x, [weight])[0] ** 2)

    in_rows = jax.grad(loss, allow_int=True)(weight)
    in_tiles = jax.grad(loss, allow_int=True)(weight.in_tiles())
    turned = Weight(weight.in_tiles().values, in_tiles.scale).in_rows()
    np.testing.assert_array_equal(turned.scale, in_rows.scale)


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
