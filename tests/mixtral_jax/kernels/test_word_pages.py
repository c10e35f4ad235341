"""A TPU's pages in words: by hand, beside the pages of `cache`, and the kernel that reads them.

The kernel is interpreted and held to XLA's form over the values that the words mean.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax import cache
from mixtral_jax.cache import RaggedBatch
from mixtral_jax.errors import ConfigError
from mixtral_jax.kernels.tpu import attention, word_pages
from mixtral_jax.kernels.xla.attention import paged_attention

WRITE = jax.jit(word_pages.write)
DTYPES = ("int8", "float8_e4m3fn")
TABLE = np.random.default_rng(0).permutation(12).reshape(4, 3)
# Two decodes, a prompt's first chunk and a later one; the last nine places are unused.
LENGTHS, NEW, USED = (5, 300, 40, 150), (1, 1, 40, 13), 55


def batch_of(lengths: tuple[int, ...], new: tuple[int, ...], room: int) -> RaggedBatch:
    """The last `new` tokens of sequences of these lengths."""
    positions = [p for n, k in zip(lengths, new, strict=True) for p in range(n - k, n)]
    arrays = (
        np.zeros(room),
        positions + [0] * (room - len(positions)),
        lengths,
        np.cumsum([0, *new]),
        TABLE,
        sum(n == 1 for n in new),
        len(new),
    )
    return RaggedBatch(*(jnp.asarray(x, jnp.int32) for x in arrays))


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def written(kv_heads: int, dtype: str) -> jax.Array:
    """Pages that held noise, with the tokens before the new ones."""
    form = word_pages.page_form(128, kv_heads, 128, dtype)
    noise = jax.random.bits(jax.random.key(0), (12, *form.shape), jnp.uint32)
    pages = jax.lax.bitcast_convert_type(noise, jnp.int32)
    before = tuple(n - k for n, k in zip(LENGTHS, NEW, strict=True))
    past = batch_of(before, before, 448)
    k, v = normal(1, 448, kv_heads, 128), normal(2, 448, kv_heads, 128)
    return WRITE(pages, k, v, past)


def test_a_scale_has_eight_bits_and_is_no_smaller() -> None:
    """1 + 1/8 is kept, what is just above 1 goes up to it; 0 and tiny ones become 2^-24."""
    scales = jnp.asarray([1.0, 1.125, 1.0001, 0.75, 0.0, 1e-9])
    codes = word_pages.scale_code(scales)
    assert codes.tolist() == [24 * 8, 24 * 8 + 1, 24 * 8 + 1, 23 * 8 + 4, 0, 0]
    assert word_pages.scale_of(codes).tolist() == [1.0, 1.125, 1.125, 0.75, 2**-24, 2**-24]


def test_the_bits_of_fp8() -> None:
    """Every number of float8_e4m3fn but its two NaNs, as jax widens it."""
    bits = jnp.arange(256, dtype=jnp.int32)
    want = jax.lax.bitcast_convert_type(bits.astype(jnp.uint8), jnp.float8_e4m3fn)
    is_number = ~jnp.isnan(want.astype(jnp.float32))
    np.testing.assert_array_equal(
        word_pages.fp8_of(bits)[is_number], want.astype(jnp.float32)[is_number]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_writes_what_cache_writes_and_nothing_else(kv_heads: int, dtype: str) -> None:
    """fp8 to the bit, int8 within half a step, whose scale is at most an eighth too large."""
    batch, pages = batch_of(LENGTHS, NEW, 64), written(kv_heads, dtype)
    k, v = normal(3, 64, kv_heads, 128), normal(4, 64, kv_heads, 128)
    before = word_pages.read(pages, kv_heads)
    after = word_pages.read(WRITE(pages, k, v, batch), kv_heads)
    want = cache.write(before, k, v, batch)
    changed = jnp.any(want != before, axis=(2, 3))
    assert int(changed.sum()) == USED
    np.testing.assert_array_equal(after[~changed], before[~changed])
    got, exact = after[changed], want[changed]
    if dtype == "int8":
        step = jnp.max(jnp.abs(exact), axis=-1, keepdims=True) / 127 * 1.125
        assert bool(jnp.all(jnp.abs(got - exact) <= step / 2 + 1e-6))
    else:
        fp8 = exact.astype(jnp.float8_e4m3fn)
        np.testing.assert_array_equal(got, fp8.astype(jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv_heads", "group", "window", "dtype"),
    [
        (1, 4, 40, "int8"),
        pytest.param(2, 3, None, "int8", marks=pytest.mark.soak),
        (1, 2, None, "float8_e4m3fn"),
    ],
)
def test_attention(kv_heads: int, group: int, window: int | None, dtype: str) -> None:
    batch, pages = batch_of(LENGTHS, NEW, 64), written(kv_heads, dtype)
    k, v = normal(3, 64, kv_heads, 128), normal(4, 64, kv_heads, 128)
    q = normal(5, 64, kv_heads * group, 128)
    got, pages = attention.attend(q, k, v, pages, batch, window, interpret=True)
    want = paged_attention(q, word_pages.read(pages, kv_heads), batch, window)
    np.testing.assert_allclose(got[:USED], want[:USED], rtol=0, atol=1e-5)


def test_heads_that_fit_no_tile_are_refused() -> None:
    for kv_heads, head_size in ((3, 128), (8, 64)):
        with pytest.raises(ConfigError, match=f"these are {kv_heads} of {head_size}.*another --me"):
            word_pages.page_form(128, kv_heads, head_size, "int8")
    with pytest.raises(ConfigError, match="in pages of 64: .*, or give --page-size 128"):
        word_pages.page_form(64, 8, 128, "int8")
