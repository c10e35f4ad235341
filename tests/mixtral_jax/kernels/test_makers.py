"""Every maker's function equals XLA's: interpreted off its device, for real on it."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.cache import RaggedBatch, round_heads
from mixtral_jax.kernels import Kernels, kernels_for, kernels_for_device
from mixtral_jax.kernels.cpu import build
from mixtral_jax.weight import INT8_GROUPS, Weight, is_quantized

XLA = kernels_for("xla")
MAKERS = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(not build.available(), reason="no C++ compiler is installed"),
    ),
    pytest.param("gpu", marks=pytest.mark.device("gpu")),
    pytest.param("tpu", marks=pytest.mark.device("tpu")),
]


def record_of(platform: str) -> Kernels:
    """The kernels of the device that is here, or those that are interpreted in its place."""
    device = jax.devices()[0]
    return kernels_for_device(device) if device.platform == platform else kernels_for(platform)


@pytest.fixture(params=MAKERS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return record_of(request.param)


@pytest.fixture
def run(kernels: Kernels, interpret: bool) -> Callable[..., Any]:
    """Calls a function of the record by its name, interpreted if its device is not there."""

    def call(name: str, *given: Any) -> Any:
        function = getattr(kernels, name)
        # A function that the maker takes from XLA, or from C++, has nothing to interpret.
        if interpret and "interpret" in inspect.signature(function).parameters:
            function = partial(function, interpret=True)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*given)

    return call


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def weight(seed: int, dtype: str, *shape: int) -> Weight:
    values = normal(seed, *shape)
    return Weight.quantized(values, dtype) if is_quantized(dtype) else Weight(values, None)


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4", "fp8"])
def test_linear(run: Callable[..., Any], dtype: str) -> None:
    x, weights = normal(0, 5, 128), [weight(1, dtype, 64, 128), weight(2, dtype, 128, 128)]
    for got, want in zip(run("linear", x, weights), XLA.linear(x, weights), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("rows", "sizes"), [(130, [70, 0, 58]), (700, [300, 1, 390])])
@pytest.mark.parametrize("outputs", [256, 200], ids=["tiles", "no whole tiles"])
def test_grouped(
    run: Callable[..., Any], rows: int, sizes: list[int], outputs: int, dtype: str
) -> None:
    """Groups that are empty and that end within a tile; rows behind the last group."""
    x, experts = normal(0, rows, 128), weight(1, dtype, 3, outputs, 128)
    groups, used = jnp.asarray(sizes, jnp.int32), sum(sizes)
    want = XLA.grouped(x, groups, experts)
    got = run("grouped", x, groups, experts)
    np.testing.assert_allclose(got[:used], want[:used], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4", "fp8"])
@pytest.mark.parametrize(("rows", "sizes"), [(2, [0, 1, 1]), (2, [0, 0, 0]), (20, [17, 0, 2])])
def test_grouped_few_rows(run: Callable[..., Any], rows: int, sizes: list[int], dtype: str) -> None:
    """Nothing of an expert without rows comes into the product: its weights, or scales, are NaN."""
    x, (values, scale) = normal(0, rows, 128), weight(1, dtype, 3, 256, 128)
    groups, used = jnp.asarray(sizes, jnp.int32), sum(sizes)
    want = XLA.grouped(x, groups, Weight(values, scale))
    spoilt = values if scale is None else scale
    unused = (groups == 0).reshape(-1, *(1,) * (spoilt.ndim - 1))
    spoilt = jnp.where(unused, jnp.nan, spoilt)
    given = Weight(spoilt, None) if scale is None else Weight(values, spoilt)
    got = run("grouped", x, groups, given)
    np.testing.assert_allclose(got[:used], want[:used], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grouped_int8_groups(run: Callable[..., Any], dtype: str) -> None:
    """Rows of float32 are rounded to int8, and those of bfloat16 meet widened weights."""
    x, groups = normal(0, 20, 128).astype(dtype), jnp.asarray([12, 0, 5], jnp.int32)
    experts = Weight.quantized(normal(1, 3, 256, 128), INT8_GROUPS)
    got, want = run("grouped", x, groups, experts)[:17], XLA.grouped(x, groups, experts)[:17]
    tolerance = 1e-4 if dtype == "float32" else 0.2  # products of 128 numbers near 1, in bfloat16
    np.testing.assert_allclose(
        got.astype(jnp.float32), want.astype(jnp.float32), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("groups", [3, 40], ids=["masked", "grouped"])
def test_add_low_rank(run: Callable[..., Any], groups: int) -> None:
    """Rows of several groups, and of none, whose numbers stay as they are in every bit."""
    x, rank = normal(0, 37, 96), 16
    group = jnp.asarray(np.random.default_rng(0).integers(-1, groups, 37), jnp.int32)
    lows = [(normal(1, groups, rank, 96), normal(2, groups, rank, n)) for n in (64, 33)]
    ys = [normal(3, 37, 64), normal(4, 37, 33)]
    for y, (a, b), got in zip(ys, lows, run("add_low_rank", ys, x, group, lows), strict=True):
        for row in range(37):
            own = y[row] if group[row] < 0 else y[row] + (a[group[row]] @ x[row]) @ b[group[row]]
            np.testing.assert_allclose(got[row], own, rtol=0, atol=1e-4 * float(group[row] >= 0))


def test_norm(run: Callable[..., Any]) -> None:
    x, scale = normal(0, 7, 128) * 3, normal(1, 128)
    np.testing.assert_allclose(
        run("norm", x, scale, 1e-5), XLA.norm(x, scale, 1e-5), rtol=1e-5, atol=1e-6
    )


def test_swiglu(run: Callable[..., Any]) -> None:
    gate, up = jnp.linspace(-120, 120, 3 * 503).reshape(3, 503), normal(0, 3, 503)
    np.testing.assert_allclose(run("swiglu", gate, up), XLA.swiglu(gate, up), rtol=1e-5, atol=1e-30)


def test_router_input(run: Callable[..., Any]) -> None:
    x = normal(0, 7, 128)
    np.testing.assert_array_equal(run("router_input", x), x)


def ragged_batch() -> RaggedBatch:
    """Two decodes, prompts within a tile, of a tile and beyond, after tokens and without."""
    lengths, starts = [5, 300, 70, 128, 450, 7, 0], [0, 1, 2, 33, 161, 400, 407, 407]
    width = 30
    positions = [
        position
        for row, length in enumerate(lengths)
        for position in range(length - starts[row + 1] + starts[row], length)
    ]
    table = np.random.default_rng(3).permutation(7 * width).reshape(7, width)
    return RaggedBatch(
        tokens=jnp.zeros(420, jnp.int32),
        positions=jnp.asarray([*positions, *[0] * 13], jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        query_starts=jnp.asarray(starts, jnp.int32),
        page_table=jnp.asarray(table, jnp.int32),
        num_decodes=jnp.asarray(2, jnp.int32),
        num_sequences=jnp.asarray(6, jnp.int32),
    )


def written_places(batch: RaggedBatch, page_size: int) -> np.ndarray:
    """The places of pages that hold a token of one of the sequences: [P Y] bool."""
    table, lengths = np.asarray(batch.page_table), np.asarray(batch.lengths)
    written = np.zeros((table.size, page_size), bool)
    for row, length in enumerate(lengths):
        places = np.arange(length)
        written[table[row, places // page_size], places % page_size] = True
    return written


@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("group", "window"), [(1, None), (3, 40)])
def test_attend(run: Callable[..., Any], group: int, window: int | None, dtype: str) -> None:
    """Unused pages, and queries behind the last token, hold NaN.

    JAX cannot interpret its ragged paged attention for TPU, which takes heads of 128: these heads
    of 32 go by XLA there, and test_compiled_ahead.py holds the kernel's meaning.
    """
    page_size, kv_heads, size, used = 16, 2, 32, 407
    batch = ragged_batch()
    pages = normal(1, batch.page_table.size, page_size, 2 * kv_heads, size)
    if dtype != "int8":
        written = written_places(batch, page_size)
        pages = jnp.where(written[:, :, None, None], pages, jnp.nan)
    pages = round_heads(pages, jnp.dtype(dtype))
    q = normal(2, 420, kv_heads * group, size)
    q = jnp.where((jnp.arange(420) < used)[:, None, None], q, jnp.nan)
    k, v = normal(3, 420, kv_heads, size), normal(4, 420, kv_heads, size)
    want, want_pages = XLA.attend(q, k, v, pages, batch, window)
    got, got_pages = run("attend", q, k, v, pages, batch, window)
    # With int8 a kernel may round half a step the other way, by the last bit of 1 / scale.
    tolerance = 0.02 if dtype == "int8" else 2e-5
    np.testing.assert_allclose(got[:used], want[:used], rtol=0, atol=tolerance)
    assert not jnp.isnan(want[:used]).any()
    assert jnp.mean(got_pages != want_pages, where=~jnp.isnan(want_pages)) < 1e-3


@pytest.mark.parametrize("window", [None, 100])
def test_full_attention(run: Callable[..., Any], window: int | None) -> None:
    q, k, v = normal(0, 2, 256, 4, 128), normal(1, 2, 256, 2, 128), normal(2, 2, 256, 2, 128)
    want = XLA.full_attention(q, k, v, window, None)
    got = run("full_attention", q, k, v, window, None)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu", "xla"])
def test_each_function_says_whether_it_differentiates(platform: str) -> None:
    """With gradients, what has none is XLA's; what is named as differentiable stays."""
    kernels = record_of(platform)
    changed = kernels.with_gradients()
    for name in ("linear", "grouped", "norm", "swiglu", "full_attention"):
        kept = name in kernels.differentiable
        assert getattr(changed, name) is getattr(kernels if kept else XLA, name)


def differentiable_calls() -> dict[str, tuple[Callable[[Callable[..., Any]], Any], list[Any]]]:
    """Of each function of the record that differentiates: a call of it, and what it varies.

    Grouped rows stand behind the last group, an expert has none, and tiles are cut by groups.
    """
    sizes, rows = jnp.asarray([70, 0, 55], jnp.int32), normal(0, 130, 128)
    int8, fp8 = weight(1, "int8", 3, 256, 128), weight(1, "fp8", 3, 256, 128)
    segments = jnp.asarray(np.repeat([[1, 2, 3, 0]], [100, 60, 80, 16], axis=1), jnp.int32)
    heads = [normal(seed, 1, 256, n, 128) for seed, n in ((0, 4), (1, 2), (2, 2))]

    def attention(window: int | None, given: Any) -> Callable[[Callable[..., Any]], Any]:
        return lambda f: lambda q, k, v: f(q, k, v, window, None, given)

    return {
        "linear": (
            lambda f: lambda x, w: f(x, [Weight(w, None)])[0],
            [normal(0, 5, 128), normal(1, 64, 128)],
        ),
        "linear int8": (
            lambda f: lambda x, scale: f(x, [Weight(int8.values[0], scale)])[0],
            [normal(0, 5, 128), int8.scale[0]],
        ),
        "grouped": (
            lambda f: lambda x, w: f(x, sizes, Weight(w, None))[:125],
            [rows, normal(1, 3, 256, 128)],
        ),
        "grouped thin": (
            lambda f: lambda x, w: f(x, sizes, Weight(w, None))[:125],
            [rows, normal(1, 3, 7, 128)],
        ),
        "grouped int8": (
            lambda f: lambda x, scale: f(x, sizes, Weight(int8.values, scale))[:125],
            [rows, int8.scale],
        ),
        "grouped fp8": (
            lambda f: lambda x, scale: f(x, sizes, Weight(fp8.values, scale))[:125],
            [rows, fp8.scale],
        ),
        "norm": (lambda f: lambda x, w: f(x, w, 1e-5), [normal(0, 7, 128), normal(1, 128)]),
        "swiglu": (lambda f: f, [normal(0, 3, 503) * 4, normal(1, 3, 503)]),
        "add_low_rank": (
            lambda f: lambda x, a, b: f([x], x, jnp.asarray([1, -1, 0]), [(a, b)])[0],
            [normal(0, 3, 16), normal(1, 2, 4, 16), normal(2, 2, 4, 16)],
        ),
        "router_input": (lambda f: f, [normal(0, 7, 128)]),
        "after": (lambda f: lambda x, y: f(x, {"a": [y]}), [normal(0, 7, 128), normal(1, 3)]),
        "full_attention": (attention(100, None), heads),
        "full_attention packed": (attention(None, segments), heads),
    }


@pytest.mark.parametrize("case", list(differentiable_calls()))
def test_gradient(run: Callable[..., Any], kernels: Kernels, case: str) -> None:
    """Functions that are named as differentiable have XLA's gradient in all that they take."""
    name, (made, given) = case.split()[0], differentiable_calls()[case]
    slope = normal(9, *jax.eval_shape(made(getattr(XLA, name)), *given).shape)

    @jax.jit
    def gradient(*given: jax.Array) -> Any:
        return jax.vjp(made(partial(run, name)), *given)[1](slope)

    if name not in kernels.differentiable:
        with pytest.raises(NotImplementedError, match=rf"{name}\) has no gradient"):
            gradient(*given)
        return
    want = jax.jit(lambda *given: jax.vjp(made(getattr(XLA, name)), *given)[1](slope))(*given)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got = gradient(*given)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.abs(b).max()) + 2e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu", "xla"])
def test_each_function_has_a_gradient_or_refuses_it_by_name(platform: str) -> None:
    kernels = record_of(platform)
    moves = {"move_rows", "can_move_rows"}  # tests of the expert exchange hold these
    tried = {case.split()[0] for case in differentiable_calls()}
    functions = {f.name for f in fields(kernels) if callable(getattr(kernels, f.name))}
    numbers = {"expert_reads", "page_form"}  # these take no arrays
    orders = {"arranged"}  # test_cpu_groups.py holds its gradient
    assert functions == tried | moves | numbers | orders | {"attend"}
    assert functions - kernels.differentiable <= {"attend", "add_low_rank"}
    batch = ragged_batch()
    pages = normal(1, batch.page_table.size, 16, 4, 32)
    k = normal(3, 420, 2, 32)

    def total(q: jax.Array) -> jax.Array:
        return jnp.sum(kernels.attend(q, k, k, pages, batch, None)[0])

    with pytest.raises(NotImplementedError, match=r"attend\) has no gradient"):
        jax.grad(total)(normal(2, 420, 2, 32))


@pytest.mark.slow
def test_scores_are_scaled_in_float32() -> None:
    """Heads of 128: 1/sqrt(128) is no bfloat16. The error is that of rounding the result."""
    batch = ragged_batch()
    pages = normal(1, batch.page_table.size, 16, 4, 128).astype(jnp.bfloat16)
    q, k, v = (
        (3 * normal(seed, 420, heads, 128)).astype(jnp.bfloat16)
        for seed, heads in ((2, 4), (3, 2), (4, 2))
    )
    got, written = XLA.attend(q, k, v, pages, batch, None)
    exact, _ = XLA.attend(*(x.astype(jnp.float32) for x in (q, k, v, pages)), batch, None)
    rounded = exact.astype(jnp.bfloat16)

    def rms(x: jax.Array) -> float:
        return float(jnp.sqrt(jnp.mean(jnp.square(x[:407].astype(jnp.float32)))))

    error = rms(got.astype(jnp.float32) - exact)
    assert error < 1.5 * rms(rounded.astype(jnp.float32) - exact)
