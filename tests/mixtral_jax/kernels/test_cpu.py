"""The kernels equal their XLA forms, and a row's bits do not depend on the rows beside it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.cache import RaggedBatch, read, round_heads, write
from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels import kernels_for
from mixtral_jax.kernels.cpu import attention, build, products
from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.kernels.xla.attention import paged_attention
from mixtral_jax.model.layers import RMSNorm
from mixtral_jax.placement import Placement
from mixtral_jax.weight import Weight

pytestmark = pytest.mark.skipif(
    not build.available(), reason="no C++ compiler: the kernels are not used on this machine"
)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def weight(seed: int, dtype: str, *shape: int) -> Weight:
    values = normal(seed, *shape)
    return Weight.quantized(values) if dtype == "int8" else Weight(values, None)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 33])
@pytest.mark.parametrize(("outs", "n"), [(1, 1), (5, 16), (70, 131), (33, 576), (20, 4100)])
def test_linear_equals_xla(rows: int, outs: int, n: int, dtype: str) -> None:
    """Sizes that fill the registers and that leave something over on every side."""
    x, first, second = normal(0, rows, n), weight(1, dtype, outs, n), weight(2, dtype, 2 * outs, n)
    got = jax.jit(lambda: products.linear(x, [first, second]))()
    for y, w in zip(got, (first, second), strict=True):
        # sums of n products of about 1, in another order
        np.testing.assert_allclose(y, xla.product(x, w), rtol=1e-5, atol=1e-6 * n**0.5 * 3)


def test_linear_by_hand() -> None:
    """One row (1, -2) with scale 2/127: it becomes 64 and -127 (63.5 rounds to even)."""
    scaled = Weight(jnp.asarray([[10, 1]], jnp.int8), jnp.asarray([0.5]))
    (y,) = products.linear(jnp.asarray([[1.0, -2.0]]), [scaled])
    np.testing.assert_allclose(y, [[(10 * 64 - 127) * (2 / 127) * 0.5]], rtol=1e-6)


def test_a_row_of_zeros_gives_zeros() -> None:
    (y,) = products.linear(jnp.zeros((3, 16)), [weight(0, "int8", 4, 16)])
    assert y.tolist() == [[0.0] * 4] * 3


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_linear_rows_do_not_feel_each_other(dtype: str) -> None:
    x, w = normal(0, 130, 576), weight(1, dtype, 50, 576)
    (together,) = products.linear(x, [w])
    for rows in (slice(0, 1), slice(5, 8), slice(64, 129)):
        (alone,) = products.linear(x[rows], [w])
        assert jnp.array_equal(alone, together[rows])


by_bytes = pytest.mark.skipif(
    not build.multiplies_bytes(), reason="the form multiplies no bytes: slopes go by XLA's products"
)


@by_bytes
@pytest.mark.parametrize(("rows", "outs", "n"), [(25, 70, 131), (262, 33, 48), (30, 2500, 33)])
def test_slopes_of_many_rows_equal_xla(rows: int, outs: int, n: int) -> None:
    """Several weights, sizes that leave something over; 15 bits of the largest slope of a row."""
    x, first, second = normal(0, rows, n), weight(1, "int8", outs, n), weight(2, "int8", 64, n)
    slopes = [normal(3, rows, outs), normal(4, rows, 64)]

    def gradient(linear: Callable[..., list[jax.Array]]) -> Any:
        def run(x: jax.Array, scale: jax.Array) -> list[jax.Array]:
            return linear(x, [Weight(first.values, scale), second])

        return jax.jit(lambda *given: jax.vjp(run, *given)[1](slopes))(x, first.scale)

    for got, want in zip(gradient(products.linear), gradient(xla.linear), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * float(jnp.max(jnp.abs(want))))


@by_bytes
def test_slopes_of_many_rows_by_hand() -> None:
    """Slopes 2 and -1 by scales 0.5 and 1 are 16256 and -16256 steps of 1 / 16256."""
    scaled = Weight(jnp.asarray([[3, -1, 5], [7, 0, -127]], jnp.int8), jnp.asarray([0.5, 1.0]))
    slopes = jnp.tile(jnp.asarray([[2.0, -1.0]]), (24, 1))
    (dx,) = jax.vjp(lambda x: products.linear(x, [scaled])[0], jnp.ones((24, 3)))[1](slopes)
    np.testing.assert_allclose(dx, [[-4.0, -1.0, 132.0]] * 24, rtol=1e-6)


def test_norm_equals_xla() -> None:
    config = ModelConfig.smollm2_135m()
    norm = RMSNorm(config, Placement.of(config, mesh=None), nnx.Rngs(0))
    norm.weight.set_value(normal(1, 576))
    x = normal(0, 40, 576) * 3
    together = norm.paged(x)
    np.testing.assert_allclose(together, norm.full(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(norm.paged(x[7:8]), together[7:8])


def test_swiglu_equals_xla() -> None:
    """Both signs, far out, and a size that leaves something over."""
    gate, up = jnp.linspace(-120, 120, 3 * 5003).reshape(3, 5003), normal(0, 3, 5003)
    got = products.swiglu(gate, up)
    np.testing.assert_allclose(got, jax.nn.silu(gate) * up, rtol=1e-5, atol=1e-30)
    np.testing.assert_array_equal(products.swiglu(gate[1:2], up[1:2]), got[1:2])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0, 9, 0], [1, 1, 1, 1]])
def test_grouped_equals_xla(sizes: list[int], dtype: str) -> None:
    """Experts without rows, and rows behind the last group, which give zeros."""
    x, w = normal(0, 9, 48), weight(1, dtype, 4, 20, 48)
    groups, used = jnp.asarray(sizes, jnp.int32), sum(sizes)
    got = products.grouped(x, groups, w)
    np.testing.assert_allclose(got[:used], xla.grouped(x, groups, w)[:used], rtol=1e-5, atol=1e-5)
    assert not jnp.any(got[used:])


def batch_of(lengths: list[int], news: list[int], page_size: int) -> RaggedBatch:
    """Sequences with so many cached positions, the last so many of them new; pages scrambled."""
    width = -(-max(lengths) // page_size)
    table = np.random.default_rng(3).permutation(len(lengths) * width).reshape(len(lengths), -1)
    positions = [
        p for length, new in zip(lengths, news, strict=True) for p in range(length - new, length)
    ]
    return RaggedBatch(
        tokens=jnp.zeros(len(positions), jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        query_starts=jnp.asarray(np.cumsum([0, *news]), jnp.int32),
        page_table=jnp.asarray(table, jnp.int32),
        num_decodes=jnp.int32(sum(new == 1 for new in news)),
        num_sequences=jnp.int32(len(lengths)),
    )


def pages_of(batch: RaggedBatch, dtype: str) -> jax.Array:
    """Pages [P 16 4 24] full of what was there before."""
    old = normal(0, batch.page_table.size, 16, 4, 24)
    return old if dtype == "float32" else round_heads(old, jnp.int8)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("window", [None, 3, 600])
def test_paged_equals_xla(window: int | None, dtype: str) -> None:
    """Decodes and chunks; contexts within a span of 512 keys and across several."""
    batch = batch_of([1, 700, 1300, 9, 1100], [1, 1, 1, 9, 90], page_size=16)
    tokens, pages = batch.tokens.shape[0], pages_of(batch, dtype)
    q, k, v = normal(1, tokens, 6, 24), normal(2, tokens, 2, 24), normal(3, tokens, 2, 24)
    mixed, written = jax.jit(lambda: attention.attend(q, k, v, pages, batch, window))()
    want_pages = write(pages, k, v, batch)
    differ = written != want_pages
    if dtype == "float32":
        assert not jnp.any(differ)
    else:  # half a step may be rounded up or down, by the last bit of 1 / scale
        assert jnp.mean(differ) < 1e-3
        step = jnp.max(jnp.abs(read(want_pages, jnp.float32))) / 127
        gap = read(written, jnp.float32) - read(want_pages, jnp.float32)
        assert jnp.max(jnp.abs(gap)) <= 1.001 * step
    want = paged_attention(q, written, batch, window)
    np.testing.assert_allclose(mixed, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_paged_rows_do_not_feel_each_other(dtype: str) -> None:
    """The last query of a chunk of 90, of a chunk of 3, and alone: the same bits."""
    k, v = normal(2, 90, 2, 24), normal(3, 90, 2, 24)
    pages, last = pages_of(batch_of([1300], [90], page_size=16), dtype), []
    for new in (90, 3, 1):  # the first puts into the pages what the others find there
        batch = batch_of([1300], [new], page_size=16)
        q = jnp.tile(normal(1, 1, 6, 24), (new, 1, 1))
        mixed, pages = attention.attend(q, k[-new:], v[-new:], pages, batch, None)
        last.append(np.asarray(mixed[-1]))
    np.testing.assert_array_equal(last[0], last[1])
    np.testing.assert_array_equal(last[0], last[2])


def test_the_pages_stay_where_they_are() -> None:
    """Donated pages are written in place; a copy would cost more than the attention."""
    batch = batch_of([40], [1], page_size=16)
    pages = normal(0, 64, 16, 4, 24)
    before = pages.unsafe_buffer_pointer()
    q, k = normal(1, 1, 6, 24), normal(2, 1, 2, 24)
    step = jax.jit(lambda pages: attention.attend(q, k, k, pages, batch, None), donate_argnums=0)
    _, after = step(pages)
    assert after.unsafe_buffer_pointer() == before


def test_without_the_kernels_the_xla_forms_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "form", lambda: None)
    plain = kernels_for("cpu")
    assert plain.linear is xla.linear
    assert plain.deterministic_heads is None


def test_no_cpp_is_compiled_for_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("the C++ compiler was called")

    monkeypatch.setattr(build, "form", refuse)
    for platform in ("gpu", "cuda", "tpu", "xla"):
        kernels_for(platform)
