"""One form of a kernel's instructions for every card from compute capability 8.0 on.

A program is one warpgroup of 128 threads. Its products are `mma` on registers, which all these
cards have, and blocks come to shared memory by JAX's pipeline: with TMA from 9.0 on, with cp.async
before. Layouts are written out, as searching for them takes minutes. Interpreted, `mma` is XLA's
product, because the interpreter of jax 0.12 has none; all else is what the card gets.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu
from jax.typing import DTypeLike

# The library of jax 0.12; types are checked against that of 0.10, which has half of it.
plgpu: Any = mosaic_gpu

ROWS = 64  # of a tile: 16 for each warp
_BANKS = 8  # rows of a swizzled tile


def product(acc: jax.Array, a: jax.Array, b: jax.Array, *, interpret: bool) -> jax.Array:
    """acc [M N] + a [M K] by b [K N]; acc is float32, or int32 for int8."""
    if not interpret:
        return plgpu.mma(acc, a, b)
    contracted = (((1,), (0,)), ((), ()))
    return acc + jax.lax.dot_general(a, b, contracted, preferred_element_type=acc.dtype)


def load(ref: Any, layout: Any) -> jax.Array:
    """The values of a block in shared or global memory, laid out over the threads."""
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref: Any, values: jax.Array) -> None:
    """Puts values of any layout into a block of shared or global memory."""
    plgpu.store(ref, values, optimized=False)


def kernel(
    body: Callable[..., None],
    out_type: Sequence[jax.ShapeDtypeStruct],
    grid: dict[str, int],
    name: str,
    *,
    scratch: Sequence[Any] = (),
    interpret: bool,
) -> Callable[..., Sequence[jax.Array]]:
    """The kernel that runs `body` for each place of the grid, whose axes have names."""
    options = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    made: Callable[..., Sequence[jax.Array]] = plgpu.kernel(
        body,
        out_type=tuple(out_type),
        scratch_types=list(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **options,
    )
    return made


def swizzled(shape: tuple[int, int], dtype: DTypeLike) -> tuple[Any, ...]:
    """Transforms of a block in shared memory, by which no two threads want the same bank."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[1] * size * 8)
    tiling = plgpu.TilingTransform((_BANKS, swizzle // size))
    return tiling, plgpu.SwizzleTransform(swizzle)
