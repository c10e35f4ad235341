"""Products of rows with int8 and int4 weights that are read from memory, not from a cache."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp

from benchmarks.cpu_kernels.measurement import Measurement, shortest_seconds
from mixtral_jax.kernels.cpu import order, products
from mixtral_jax.weight import GROUP_SIZE, Weight

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
# SmolLM2-135M's gate or up, down and head, and Mistral-7B's query, gate or up, and down.
SHAPES = ((1536, 576), (576, 1536), (49152, 576), (4096, 4096), (14336, 4096), (4096, 14336))
_COLD_BYTES = 192 << 20  # of all weights of a shape: more than caches hold
_MOST_WEIGHTS = 96
_HOT_ROWS = 64  # from here on fewer weights will do, as they are not what takes time


def measurements(rows: Sequence[int] = ROWS) -> Iterator[Measurement]:
    """Measures every dtype and shape with every number of rows."""
    for dtype, (outs, n) in product(("int8", "int4"), SHAPES):
        weights = [_weight(outs, n, dtype, 0)]
        bytes_read = sum(array.nbytes for array in weights[0].arrays)
        count = min(_MOST_WEIGHTS, max(2, _COLD_BYTES // bytes_read))
        weights += [_weight(outs, n, dtype, seed) for seed in range(1, count)]
        for size in rows:
            some = weights[: max(2, count // 8)] if size >= _HOT_ROWS else weights
            x = jax.random.normal(jax.random.key(0), (size, n))
            seconds = shortest_seconds(partial(_multiply, x, some)) / len(some)
            yield Measurement(
                work=f"{dtype} [{outs}, {n}]",
                size=str(size),
                seconds=seconds,
                bytes_read=bytes_read,
                multiply_adds=size * outs * n,
                kind="int8",
            )


def _weight(outs: int, n: int, dtype: str, seed: int) -> Weight:
    key = jax.random.key(seed)
    if dtype == "int8":
        return Weight(jax.random.randint(key, (outs, n), -127, 128, jnp.int8), jnp.full(outs, 0.01))
    halves = jax.random.bits(key, (outs, n // 2), jnp.uint8)
    pairs = jnp.full((outs, n // GROUP_SIZE, 2), 0.01, jnp.float16)
    return products.arranged(Weight(halves, pairs))


@jax.jit
def _multiply(x: jax.Array, weights: list[Weight]) -> jax.Array:
    """The products with one weight after the other, as the layers of a model come."""
    for weight in weights:
        (y,) = products.linear(x, [weight])
        x = order.after(x, y)
    return x
