"""Paged decode on GPU by hand, and which form a card gets.

test_makers.py holds the other kernels of this jax's form against XLA's; Mosaic GPU's stand here as
well, small, because the newest jax runs this file only.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.cache import RaggedBatch, round_heads
from mixtral_jax.kernels import kernels_for
from mixtral_jax.kernels.gpu.form import form_for
from mixtral_jax.kernels.gpu.triton import attention as gpu
from mixtral_jax.kernels.xla import attention as xla
from mixtral_jax.kernels.xla import products
from mixtral_jax.weight import Weight

MOSAIC = jax.__version_info__ >= (0, 12)


@pytest.mark.slow
@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.soak), 40])
def test_decode(window: int | None) -> None:
    """Lengths within a page, at a block's end and over many splits; unused pages hold NaN."""
    page_size, kv_heads, group, size, width = 16, 2, 3, 32, 50
    lengths = jnp.asarray([1, 16, 64, 65, 790, 0], jnp.int32)
    first = jnp.zeros_like(lengths) if window is None else lengths - window
    keys = jax.random.split(jax.random.key(1), 3)
    table = jax.random.permutation(keys[0], 6 * width).reshape(6, width).astype(jnp.int32)
    pages = jax.random.normal(keys[1], (6 * width, page_size, 2 * kv_heads, size))
    q = jax.random.normal(keys[2], (6, kv_heads * group, size))
    want = np.zeros((6, kv_heads * group, size), np.float32)
    seen = np.zeros((6 * width, page_size), bool)
    for row, (start, end) in enumerate(zip(np.maximum(first, 0), np.asarray(lengths), strict=True)):
        places = np.arange(start, end)
        index = table[row, places // page_size], places % page_size
        seen[index] = True
        held = np.asarray(pages)[index]
        for head in range(kv_heads * group):
            kv = head // group
            scores = held[:, 2 * kv] @ q[row, head] / np.sqrt(size)
            if len(places):
                weights = np.exp(scores - scores.max())
                want[row, head] = weights @ held[:, 2 * kv + 1] / weights.sum()
    pages = jnp.where(seen[:, :, None, None], pages, jnp.nan)
    assert gpu.fits(q, pages)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got = gpu.decode(q, pages, table, first, lengths, interpret=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("capability", "form"),
    [((9, 0), "mosaic"), ((8, 0), "mosaic"), ((7, 5), "xla"), (None, "triton")],
)
def test_form_of_a_card(capability: tuple[int, int] | None, form: str) -> None:
    """Before jax 0.12 every card gets Triton's form."""
    expected = form if MOSAIC else "triton"
    assert form_for(capability) == expected
    maker = kernels_for("gpu", capability=capability).attend.__module__
    assert expected in maker


def test_cards_below_ada_read_fp8_by_xla() -> None:
    """XLA's product reads all of the experts; ours those with rows, a tile of rows at a time."""
    ampere, ada = (kernels_for("gpu", capability=(8, minor)) for minor in (0, 9))
    assert ampere.attend != ada.attend and ampere.grouped != ada.grouped
    assert kernels_for("gpu") == kernels_for("gpu", capability=(10, 0)) == ada
    for dtype, of_ampere in (("float8_e4m3fn", 3), ("int8", 1)):
        experts = jax.ShapeDtypeStruct((3, 128, 256), dtype)
        assert ampere.expert_reads([0, 2, 0], 2, experts) == of_ampere
        assert ada.expert_reads([0, 2, 0], 2, experts) == 1


@pytest.mark.parametrize(("gib", "fits"), [(1, True), (2, False), (4, False), (5, True)])
def test_pages_whose_elements_pallas_miscounts_go_by_xla(gib: int, fits: bool) -> None:
    """Between 2 and 4 GiB of bytes, 32 bits with a sign are too few; above, Pallas takes 64."""
    answers: list[bool] = []
    for dtype in (jnp.float8_e4m3fn, jnp.bfloat16):
        q = jax.ShapeDtypeStruct((1, 4, 128), jnp.bfloat16)
        pages = jax.ShapeDtypeStruct((gib << 14, 64, 8, 128), dtype)  # of 64 Ki values each
        jax.eval_shape(lambda *given: answers.append(gpu.fits(*given)), q, pages)
    assert answers == [fits, True]


@pytest.mark.skipif(not MOSAIC, reason="Mosaic GPU's form is for jax 0.12 and later")
@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn", "int8"])
def test_mosaic_attention(dtype: str) -> None:
    """A decode over three pages, and a prompt's chunk behind another; places unseen hold NaN."""
    from mixtral_jax.kernels.gpu.mosaic import attention as mosaic

    keys = jax.random.split(jax.random.key(0), 4)
    batch = RaggedBatch(
        tokens=jnp.zeros(8, jnp.int32),
        positions=jnp.asarray([40, *range(17, 22), 0, 0], jnp.int32),
        lengths=jnp.asarray([41, 22, 0], jnp.int32),
        query_starts=jnp.asarray([0, 1, 6, 6], jnp.int32),
        page_table=jnp.asarray([[5, 1, 3], [2, 0, 4], [0, 0, 0]], jnp.int32),
        num_decodes=jnp.asarray(1, jnp.int32),
        num_sequences=jnp.asarray(2, jnp.int32),
    )
    pages = jax.random.normal(keys[0], (6, 16, 2, 32))
    pages = pages.at[3, 9:].set(jnp.nan).at[0, 6:].set(jnp.nan)
    pages = round_heads(pages, jnp.dtype(dtype))
    q = jax.random.normal(keys[1], (8, 3, 32))
    k, v = (jax.random.normal(key, (8, 1, 32)) for key in keys[2:])
    want, _ = xla.attend(q, k, v, pages, batch, 30)
    assert mosaic.fits(q, pages, interpret=True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got, _ = mosaic.attend(q, k, v, pages, batch, 30, interpret=True)
    assert not jnp.isnan(want[:6]).any()
    np.testing.assert_allclose(got[:6], want[:6], rtol=0, atol=2e-5)


@pytest.mark.skipif(not MOSAIC, reason="Mosaic GPU's form is for jax 0.12 and later")
@pytest.mark.parametrize("dtype", ["float32", "int8", "fp8"])
def test_mosaic_grouped(dtype: str) -> None:
    """Groups that end within a tile, one that is empty, and rows behind the last."""
    from mixtral_jax.kernels.gpu.mosaic import products as mosaic

    x = jax.random.normal(jax.random.key(0), (72, 128))
    values = jax.random.normal(jax.random.key(1), (3, 128, 128))
    weight = Weight(values, None) if dtype == "float32" else Weight.quantized(values, dtype)
    sizes = jnp.asarray([66, 0, 3], jnp.int32)
    want = products.grouped(x, sizes, weight)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got = mosaic.grouped(x, sizes, weight, interpret=True)
    np.testing.assert_allclose(got[:69], want[:69], rtol=0, atol=1e-4)


@pytest.mark.skipif(not MOSAIC, reason="the deprecated form is that of older jax")
def test_nothing_deprecated_is_lowered() -> None:
    """What pytest makes an error: a warning of JAX's while a card's program is made."""
    kernels, of, whole = kernels_for("gpu"), jax.ShapeDtypeStruct, jnp.int32
    tokens, sequences = of((8,), whole), of((3,), whole)
    batch = RaggedBatch(
        tokens, tokens, sequences, of((4,), whole), of((3, 2), whole), of((), whole), of((), whole)
    )
    rows, heads = of((8, 4, 64), jnp.bfloat16), of((8, 2, 64), jnp.bfloat16)
    pages = of((6, 64, 4, 64), jnp.bfloat16)

    def attend(q: jax.Array, k: jax.Array, pages: jax.Array, batch: RaggedBatch) -> Any:
        return kernels.attend(q, k, k, pages, batch, None)

    def grouped(x: jax.Array, sizes: jax.Array, values: jax.Array) -> Any:
        return kernels.grouped(x, sizes, Weight(values, None))

    experts = of((3, 128, 128), jnp.bfloat16)
    mixed = of((8, 128), jnp.bfloat16)
    for function, given in (
        (attend, (rows, heads, pages, batch)),
        (grouped, (mixed, sequences, experts)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lowered = jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()
