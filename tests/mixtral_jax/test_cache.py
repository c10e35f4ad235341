"""The worked example of cache.py, step by step."""

import jax.numpy as jnp
import numpy as np

from mixtral_jax import cache
from mixtral_jax.cache import RaggedBatch

BATCH = RaggedBatch(
    tokens=jnp.arange(8),
    positions=jnp.asarray([4, 8, 4, 5, 6, 0, 0, 0]),
    lengths=jnp.asarray([5, 9, 7, 0]),
    query_starts=jnp.asarray([0, 1, 2, 5, 0]),
    page_table=jnp.asarray([[7, 2, 0], [0, 3, 5], [1, 4, 0], [0, 0, 0]]),
    num_decodes=jnp.int32(2),
    num_sequences=jnp.int32(3),
)
# One token of one sequence, the first of page 7.
ONE = RaggedBatch(
    tokens=jnp.zeros(1, jnp.int32),
    positions=jnp.zeros(1, jnp.int32),
    lengths=jnp.ones(1, jnp.int32),
    query_starts=jnp.asarray([0, 1]),
    page_table=jnp.asarray([[7]]),
    num_decodes=jnp.int32(1),
    num_sequences=jnp.int32(1),
)


def test_sequences_of_tokens() -> None:
    assert BATCH.sequence_of_token()[:5].tolist() == [0, 1, 2, 2, 2]


def test_write_puts_tokens_where_the_table_says() -> None:
    """Token t has key t + 1 and value -(t + 1); three tokens of the row are unused."""
    pages = jnp.full((8, 4, 2, 1), 99.0)
    k = jnp.arange(1.0, 9.0).reshape(8, 1, 1)
    written = np.asarray(cache.write(pages, k, -k, BATCH))
    places = {(2, 0): 1.0, (5, 0): 2.0, (4, 0): 3.0, (4, 1): 4.0, (4, 2): 5.0}
    for page in range(8):
        for place in range(4):
            token = places.get((page, place))
            want = [99.0, 99.0] if token is None else [token, -token]
            assert written[page, place].ravel().tolist() == want


def test_int8_pages_hold_each_head_with_its_scale() -> None:
    """The largest of a head becomes 127; what is read is within half a step of what was written."""
    heads = jnp.asarray([[[1.0, -2.0, 0.5, 0.0], [254.0, 2.0, -100.0, 3.0], [0.0] * 4]])
    pages = cache.round_heads(heads, jnp.int8)
    assert pages.dtype == jnp.int8 and pages.shape == (1, 3, 8)
    assert pages[0, :, :4].tolist() == [[64, -127, 32, 0], [127, 1, -50, 2], [0, 0, 0, 0]]
    step = np.asarray([[[2 / 127], [2.0], [0.0]]])
    assert np.all(np.abs(cache.read(pages, jnp.float32) - heads) <= step / 2 + 1e-6)


def test_fp8_pages_hold_each_value_rounded_by_itself() -> None:
    """Three bits of mantissa: 1.0625 lies between 1 and 1.125 and goes to the even one; what is
    larger than 448 becomes 448, and a NaN stays one."""
    heads = jnp.asarray([[[1.0625, 1.1875, -0.3, 448.0], [460.0, -1e9, jnp.inf, jnp.nan]]])
    pages = cache.write(jnp.zeros((8, 4, 2, 4), jnp.float8_e4m3fn), heads[:, :1], heads[:, 1:], ONE)
    got = cache.read(pages, jnp.float32)[7, 0]
    assert got[0].tolist() == [1.0, 1.25, -0.3125, 448.0]
    assert got[1, :3].tolist() == [448.0, -448.0, 448.0] and bool(jnp.isnan(got[1, 3]))


def test_bytes_of_a_page_by_hand() -> None:
    """SmolLM2: 3 heads of 64, a key and a value each; 16 tokens of one layer."""
    sizes = {
        dtype: cache.page_form(16, 3, 64, dtype).nbytes
        for dtype in ("float32", "int8", "float8_e4m3fn")
    }
    assert sizes == {
        "float32": 16 * 2 * 3 * 64 * 4,
        "int8": 16 * 2 * 3 * (64 + 4),
        "float8_e4m3fn": 16 * 2 * 3 * 64,
    }
