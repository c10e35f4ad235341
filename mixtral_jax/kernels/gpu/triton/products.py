"""Products of rows in groups on GPU, in Pallas by way of Triton."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int

from mixtral_jax.kernels.gpu.grouped import grouped_by
from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.weight import QUANTIZED, Weight

_WIDTH = 128  # that tiles of every size divide


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
    is_whole = outputs % _WIDTH == 0 == inputs % _WIDTH
    return is_whole and values.dtype != QUANTIZED["int4"]


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
    if not _fits(weight.values):
        return xla.grouped(x, sizes, weight)
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
    tile = _Tiles.of(rows).rows
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
    rows, experts = x.shape[0], sizes.shape[0]
    size = _Tiles.of(rows)
    outputs = weight.shape[2 if is_gradient else 1]
    ends = jnp.cumsum(sizes)
    # Each group takes whole tiles of rows; the last one of it reaches into the next group, whose
    # rows it does not write.
    tiles = -(-sizes // size.rows)
    last_tile = jnp.cumsum(tiles)
    tile = jnp.arange(-(-rows // size.rows) + experts, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(last_tile, tile, side="right"), experts - 1)
    expert = expert.astype(jnp.int32)
    first = (ends - sizes)[expert] + (tile - (last_tile - tiles)[expert]) * size.rows
    out: jax.Array = pl.pallas_call(
        partial(_grouped_tile, size=size, is_gradient=is_gradient),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), dtype),
        grid=(len(tile), outputs // size.outputs),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=size.stages),
        interpret=interpret,
        name="grouped_product",
    )(x, weight, expert, first.astype(jnp.int32), ends[expert], *scales)
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
