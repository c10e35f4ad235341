"""Products of few rows, as a decode step has them: bytes of weights that they read in a second.

A model's shapes are those of Mistral-7B's feed-forward, and of a layer of Mixtral-8x7B of which a
token chooses two experts. Weights of some copies in turn are more than a cache holds.
"""

import math
from collections.abc import Iterator
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.kernels import Kernels
from mixtral_jax.weight import GROUP_SIZE, QUANTIZED, Weight

DTYPES = ("bfloat16", "int8", "fp8", "int4")
_EXPERTS, _CHOSEN = 8, 2
_COPIES, _CALLS, _REPEATS = 8, 10, 5


class ProductRate(NamedTuple):
    """A product's weights and how fast they are read.

    Attributes:
        name: the product, its rows and its weights' dtype.
        nbytes: of the weights that it has to read.
        seconds: that it takes.
    """

    name: str
    nbytes: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds


def product_rates(kernels: Kernels, wide: int, narrow: int) -> Iterator[ProductRate]:
    """Measures dense products with [wide narrow] and [narrow wide], and experts of both shapes."""
    shapes = ((wide, narrow), (narrow, wide))
    for dtype in DTYPES:
        for shape, rows in ((shapes[0], 1), (shapes[1], 1), (shapes[0], 32)):
            yield _rate(kernels, dtype, rows, shape, None)
        for shape in shapes:
            yield _rate(kernels, dtype, _CHOSEN, shape, _EXPERTS)


def _rate(
    kernels: Kernels, dtype: str, rows: int, shape: tuple[int, int], experts: int | None
) -> ProductRate:
    outputs, inputs = shape
    whole = shape if experts is None else (experts, *shape)
    weights = [_weight(key, dtype, whole) for key in jax.random.split(jax.random.key(0), _COPIES)]
    xs = jax.random.normal(jax.random.key(1), (_COPIES, rows, inputs)).astype(jnp.bfloat16)

    def products(out: Any, xs: jax.Array, weights: list[Weight]) -> list[jax.Array]:
        del out  # whose memory the results take: at the same place a card's graph stays as it is
        if experts is None:
            return [kernels.linear(x, [w])[0] for x, w in zip(xs, weights, strict=True)]
        sizes = jnp.zeros(experts, jnp.int32).at[jnp.asarray([1, 5])].set(rows // _CHOSEN)
        return [kernels.grouped(x, sizes, w) for x, w in zip(xs, weights, strict=True)]

    run = jax.jit(products, donate_argnums=0, keep_unused=True)
    out = [jnp.zeros((rows, outputs), jnp.bfloat16) for _ in range(_COPIES)]
    out = jax.block_until_ready(run(out, xs, weights))
    times = []
    for _ in range(_REPEATS):
        begun = perf_counter()
        for _ in range(_CALLS):
            out = run(out, xs, weights)
        jax.block_until_ready(out)
        times.append((perf_counter() - begun) / _CALLS / _COPIES)
    held = sum(math.prod(array.shape) * array.dtype.itemsize for array in weights[0].arrays)
    read = held if experts is None else held * _CHOSEN // experts
    kind = "linear" if experts is None else f"{_CHOSEN} of {experts} experts,"
    return ProductRate(f"{kind} [{outputs}, {inputs}] {dtype}, {rows} rows", read, median(times))


@partial(jax.jit, static_argnums=(1, 2))
def _weight(key: jax.Array, dtype: str, shape: tuple[int, ...]) -> Weight:
    """Random values; their scales are alike."""
    if dtype == "int4":
        pairs = jnp.ones((*shape[:-1], shape[-1] // GROUP_SIZE, 2), jnp.float16)
        return Weight(jax.random.bits(key, (*shape[:-1], shape[-1] // 2), jnp.uint8), pairs)
    if dtype == "bfloat16":
        return Weight(jax.random.normal(key, shape, jnp.bfloat16), None)
    values = jax.random.normal(key, shape, jnp.bfloat16) * (30 if dtype == "int8" else 1)
    return Weight(values.astype(QUANTIZED[dtype]), jnp.ones(shape[:-1], jnp.float32))
