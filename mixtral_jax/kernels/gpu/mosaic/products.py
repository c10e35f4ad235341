"""Products of rows in groups on GPU, in Mosaic GPU.

A copy of the rows is made in which each group begins with a tile of its own: blocks are fetched
whole, and the copy is small beside the experts' weights.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Float, Int

from mixtral_jax.kernels import int4
from mixtral_jax.kernels.gpu import few_rows
from mixtral_jax.kernels.gpu.grouped import grouped_by
from mixtral_jax.kernels.gpu.mosaic.warpgroup import (
    ROWS,
    kernel,
    load,
    plgpu,
    product,
    store,
    swizzled,
)
from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.weight import QUANTIZED, Weight

_OUTPUTS = 128  # of a tile
_STAGES = 3  # blocks under way


def grouped(
    x: Float[jax.Array, "M I"],
    sizes: Int[jax.Array, " E"],
    weight: Weight,
    *,
    interpret: bool = False,
) -> Float[jax.Array, "M O"]:
    """`xla.grouped`, which computes every expert for every row on NVIDIA: x [M I] -> [M O].

    By XLA itself where x is float32, which `mma` does not take, and where tiles do not fit. Weights
    of fp8 need compute capability 8.9. int4 has no kernel here: few rows are a sum of XLA's, for
    many the experts are widened in memory.
    """
    takes_rows = interpret or x.dtype in (jnp.bfloat16, jnp.float16)
    if takes_rows and weight.is_int4:
        return _grouped_int4(x, sizes, weight, interpret=interpret)
    if weight.is_int8_groups:
        return xla.grouped_int8_groups(partial(grouped, interpret=interpret), x, sizes, weight)
    if not (takes_rows and _fits(weight.values)):
        return xla.grouped(x, sizes, weight)
    return grouped_by(_tiles_of, x, sizes, weight, interpret=interpret)


def _grouped_int4(
    x: Float[jax.Array, "M I"],
    sizes: Int[jax.Array, " E"],
    weight: Weight,
    *,
    interpret: bool,
) -> Float[jax.Array, "M O"]:
    if x.dtype == jnp.float32:
        return xla.grouped(x, sizes, weight)
    if len(x) > few_rows.MOST_GROUPED:
        return grouped(x, sizes, Weight(weight.widened(x.dtype), None), interpret=interpret)
    return int4.grouped_by(few_rows.tiles_of, grouped, x, sizes, weight, interpret=interpret)


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


def _fits(values: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Says whether the kernel takes such weights [E O I], and their gradient: whole tiles."""
    outputs, inputs = values.shape[1:]
    return outputs % _OUTPUTS == 0 == inputs % _OUTPUTS


def expert_reads(sizes: Sequence[int], rows: int, weight: jax.ShapeDtypeStruct) -> float:
    """Number of experts' matrices that `grouped` reads: one for each tile of rows of each group.

    The groups are of these sizes, in `rows` rows, against weights [E O I]. XLA's form, which takes
    weights of float32 and those that are no whole tiles, reads them all. Few rows read int4 one by
    one, for many all of it is widened.
    """
    if weight.dtype == QUANTIZED["int4"]:
        return float(sum(sizes) if rows <= few_rows.MOST_GROUPED else len(sizes))
    if weight.dtype == jnp.float32 or not _fits(weight):
        return float(len(sizes))
    return float(sum(-(-size // ROWS) for size in sizes))


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
    starts = jnp.cumsum(sizes) - sizes
    tiles = -(-sizes // ROWS)
    last_tile = jnp.cumsum(tiles)
    first_tile = last_tile - tiles
    tile = jnp.arange(-(-rows // ROWS) + experts, dtype=jnp.int32)
    owner = jnp.searchsorted(last_tile, tile, side="right", method="compare_all").astype(jnp.int32)
    expert = jnp.minimum(owner, experts - 1)
    first = starts[expert] + (tile - first_tile[expert]) * ROWS
    place = first[:, None] + jnp.arange(ROWS, dtype=jnp.int32)[None, :]
    own = x[jnp.clip(place.reshape(-1), 0, rows - 1)]
    expert = jnp.where(owner < experts, expert, -1)
    total = _multiply(own, weight, expert, None if scales else dtype, interpret, is_gradient)
    of_row = xla.expert_of_row(sizes, rows)
    row = jnp.arange(rows, dtype=jnp.int32)
    out = total[jnp.clip(first_tile[of_row] * ROWS + row - starts[of_row], 0, len(total) - 1)]
    if not scales:
        return out
    *of_rows, of_outputs = scales
    factor = of_outputs[of_row]
    for x_scale in of_rows:
        factor = x_scale[:, None] * factor
    return (out.astype(jnp.float32) * factor).astype(dtype)


def _multiply(
    x: jax.Array,
    weight: jax.Array,
    expert: jax.Array,
    dtype: jnp.dtype | None,
    interpret: bool,
    is_gradient: bool,
) -> jax.Array:
    """Tiles of rows [tiles*ROWS I], each by its own expert: [tiles*ROWS O].

    Without dtype the sums are as they are made, float32 or int32.

    The results of tiles of no expert (-1) are unspecified.
    """
    contracted, outputs = weight.shape[1:] if is_gradient else weight.shape[:0:-1]
    inputs = 128 // x.dtype.itemsize  # of a step: a bank's row
    total_dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    layouts = (plgpu.Layout.MMA_ACC, plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS)
    of_total, of_rows, of_block = (layout(x.dtype) for layout in layouts)

    shape = (inputs, _OUTPUTS) if is_gradient else (_OUTPUTS, inputs)
    # fp8, and int8 in a gradient, are beside floats: widened in shared memory.
    widened = plgpu.SMEM(shape, x.dtype, transforms=swizzled(shape, x.dtype))
    scratch = [widened] if weight.dtype != x.dtype else []

    def tile_of_rows(rows, weights, experts, out, *scratch):  # type: ignore[no-untyped-def]
        tile, column = jax.lax.axis_index("tile"), jax.lax.axis_index("column")
        own = experts[tile]

        def step(_, rows, block, total):  # type: ignore[no-untyped-def]
            for widened in scratch:
                # The sum with zero keeps the two casts apart: one alone needs a card of 9.0.
                values = block[...].astype(jnp.float32) + 0.0
                store(widened, values.astype(widened.dtype))
                block = widened
            b = load(block if is_gradient else block.T, of_block)
            return product(total, load(rows, of_rows), b, interpret=interpret)

        @pl.when(own >= 0)
        def _() -> None:
            total = jnp.zeros((ROWS, _OUTPUTS), total_dtype)
            total = plgpu.emit_pipeline(
                step,
                grid=(contracted // inputs,),
                in_specs=(
                    plgpu.BlockSpec(
                        (ROWS, inputs),
                        lambda i: (tile, i),
                        transforms=swizzled((ROWS, inputs), x.dtype),
                    ),
                    plgpu.BlockSpec(
                        shape,
                        lambda i: (i, column) if is_gradient else (column, i),
                        transforms=swizzled(shape, weight.dtype),
                    ),
                ),
                max_concurrent_steps=_STAGES,
                init_carry=plgpu.layout_cast(total, of_total),
            )(rows, weights.at[own])
            places = (pl.ds(tile * ROWS, ROWS), pl.ds(column * _OUTPUTS, _OUTPUTS))
            store(out.at[places], total.astype(out.dtype))

    (out,) = kernel(
        tile_of_rows,
        [jax.ShapeDtypeStruct((len(x), outputs), dtype or total_dtype)],
        {"tile": len(expert), "column": outputs // _OUTPUTS},
        "grouped_product",
        scratch=scratch,
        interpret=interpret,
    )(x, weight, expert)
    return out
