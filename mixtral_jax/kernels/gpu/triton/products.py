"""Products on GPU, in Pallas by way of Triton: of rows in groups, and with int4 weights."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int

from mixtral_jax.kernels import int4
from mixtral_jax.kernels.gpu.grouped import grouped_by
from mixtral_jax.kernels.gpu.triton.int4 import tile_rows as tile_rows_of_int4
from mixtral_jax.kernels.gpu.triton.int4 import tiles_of as tiles_of_int4
from mixtral_jax.kernels.gpu.triton.walk import Walk
from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.weight import QUANTIZED, Weight

_WIDTH = 128  # that tiles of every size divide
# More rows meet a copy of int4 weights that XLA widens: it is then read for less time than it is
# multiplied, by products that are faster than ours.
_MOST_ROWS = 256


class _Tiles(NamedTuple):
    """Sizes of the tiles of a grouped product, and how many of a program's tiles are fetched ahead.

    A program computes a tile of rows by a tile of outputs. Few rows take narrow tiles, because one
    expert's programs are then all that read from memory, and need to be many.
    """

    rows: int
    outputs: int
    inputs: int
    stages: int

    @classmethod
    def of(cls, rows: int) -> "_Tiles":
        """The tiles for so many rows in all groups together."""
        if rows <= 16:
            return cls(16, 32, 128, 4)
        return cls(32, 64, 64, 4) if rows <= 32 else cls(64, 128, 64, 3)


def _fits(values: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Says whether the kernel takes such weights [E O I], and their gradient: whole tiles."""
    outputs, inputs = values.shape[1:]
    inputs *= 2 if values.dtype == QUANTIZED["int4"] else 1
    return outputs % _WIDTH == 0 == inputs % _WIDTH


def linear(
    x: Float[jax.Array, "R I"], weights: Sequence[Weight], *, interpret: bool = False
) -> list[Float[jax.Array, "R O"]]:
    """`xla.linear`, with int4 by a kernel, up to so many rows that XLA's widened copy is cheap."""
    return int4.linear_by(_int4_tiles_for, x, weights, interpret=interpret)


def linear_in_fp8(
    x: Float[jax.Array, "R I"], weights: Sequence[Weight], *, interpret: bool = False
) -> list[Float[jax.Array, "R O"]]:
    """`xla.linear_in_fp8` likewise, on cards that multiply fp8."""
    return int4.linear_by(_int4_tiles_for, x, weights, interpret=interpret, rounds_to_fp8=True)


def _int4_tiles_for(x: jax.Array, values: jax.Array) -> int4.TilesOf | None:
    """The kernel for rows [R I] and the values of a weight [O I] of int4; None for XLA's form."""
    is_fit = _fits(values[None]) and x.shape[0] <= _MOST_ROWS
    return tiles_of_int4 if is_fit else None


def grouped(
    x: Float[jax.Array, "M I"],
    sizes: Int[jax.Array, " E"],
    weight: Weight,
    *,
    interpret: bool = False,
) -> Float[jax.Array, "M O"]:
    """`xla.grouped`, which computes every expert for every row on NVIDIA: x [M I] -> [M O].

    Weights of fp8 need compute capability 8.9.
    """
    if weight.is_int8_groups:
        return xla.grouped_int8_groups(partial(grouped, interpret=interpret), x, sizes, weight)
    if not _fits(weight.values):
        return xla.grouped(x, sizes, weight)
    if weight.is_int4:
        return int4.grouped_by(tiles_of_int4, grouped, x, sizes, weight, interpret=interpret)
    return grouped_by(_tiles_of, x, sizes, weight, interpret=interpret)


def grouped_without_fp8(
    x: Float[jax.Array, "M I"],
    sizes: Int[jax.Array, " E"],
    weight: Weight,
    *,
    interpret: bool = False,
) -> Float[jax.Array, "M O"]:
    """`grouped` for cards below 8.9: weights of fp8 take XLA's form."""
    if weight.is_fp8:
        return xla.grouped(x, sizes, weight)
    return grouped(x, sizes, weight, interpret=interpret)


def expert_reads(sizes: Sequence[int], rows: int, weight: jax.ShapeDtypeStruct) -> float:
    """Number of experts' matrices that `grouped` reads: one for each tile of rows of each group.

    The groups are of these sizes, in `rows` rows, against weights [E O I]. XLA's form, which takes
    weights that are no whole tiles, reads them all.
    """
    if not _fits(weight):
        return float(len(sizes))
    is_int4 = weight.dtype == QUANTIZED["int4"]
    tile = tile_rows_of_int4(rows) if is_int4 else _Tiles.of(rows).rows
    return float(sum(-(-size // tile) for size in sizes))


def expert_reads_without_fp8(
    sizes: Sequence[int], rows: int, weight: jax.ShapeDtypeStruct
) -> float:
    """`expert_reads` of `grouped_without_fp8`."""
    if weight.dtype == QUANTIZED["fp8"]:
        return float(len(sizes))
    return expert_reads(sizes, rows, weight)


def _tiles_of(
    x: jax.Array,
    sizes: jax.Array,
    weight: jax.Array,
    scales: tuple[jax.Array, ...],
    dtype: jnp.dtype,
    interpret: bool,
    is_gradient: bool,
) -> jax.Array:
    """`grouped.TilesOf`."""
    rows = x.shape[0]
    size = _Tiles.of(rows)
    outputs = weight.shape[2 if is_gradient else 1]
    walk = Walk.of(sizes, rows, size.rows)
    out: jax.Array = pl.pallas_call(
        partial(_grouped_tile, size=size, is_gradient=is_gradient),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), dtype),
        grid=(len(walk.expert), outputs // size.outputs),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=size.stages),
        interpret=interpret,
        name="grouped_product",
    )(x, weight, *walk, *scales)
    return out


def _grouped_tile(  # type: ignore[no-untyped-def]
    x, weight, expert, first, end, *scales_and_out, size, is_gradient
):
    *scales, out = scales_and_out
    tile, column = pl.program_id(0), pl.program_id(1)
    places = pl.ds(first[tile], size.rows)
    is_mine = first[tile] + jnp.arange(size.rows, dtype=jnp.int32) < end[tile]
    columns = pl.ds(column * size.outputs, size.outputs)
    kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32

    def step(i, total):  # type: ignore[no-untyped-def]
        inputs = pl.ds(i * size.inputs, size.inputs)
        rows = plgpu.load(x.at[places, inputs], mask=is_mine[:, None], other=0)
        # A gradient contracts the weight's outputs.
        places_in = (inputs, columns) if is_gradient else (columns, inputs)
        block = weight[(expert[tile], *places_in)].astype(rows.dtype)
        contracted = ((1,), (0 if is_gradient else 1,))
        return total + jax.lax.dot_general(
            rows, block, (contracted, ((), ())), preferred_element_type=kind
        )

    @pl.when(first[tile] < end[tile])
    def _() -> None:
        total = jnp.zeros((size.rows, size.outputs), kind)
        total = jax.lax.fori_loop(0, x.shape[1] // size.inputs, step, total)
        if scales:
            *of_rows, of_outputs = scales
            factor = of_outputs[expert[tile], columns][None, :]
            for x_scale in of_rows:
                factor = plgpu.load(x_scale.at[places], mask=is_mine, other=0)[:, None] * factor
            total = total.astype(jnp.float32) * factor
        plgpu.store(out.at[places, columns], total.astype(out.dtype), mask=is_mine[:, None])
