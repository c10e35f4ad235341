"""Products of rows in groups on TPU: a kernel of ours, which reads no expert without rows.

Gradients are by megablox. Sizes of its tiles are always given: left out, it would ask the default
device, which is another one where programs are compiled for hardware that is elsewhere.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mixtral_jax.kernels import int4
from mixtral_jax.kernels.tpu import int4 as int4_on_tpu
from mixtral_jax.kernels.tpu.tiles import LANES, Tiles, fetches
from mixtral_jax.kernels.tpu.walk import Walk
from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.weight import QUANTIZED, Weight, round_rows


def _fits(values: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Says whether a kernel takes such weights [E O I]: whole tiles."""
    if values.dtype == QUANTIZED["int4"]:
        return int4_on_tpu.fits(values)
    outputs, inputs = values.shape[1:]
    return outputs % LANES == 0 == inputs % LANES


def linear(x: jax.Array, weights: Sequence[Weight], *, interpret: bool = False) -> list[jax.Array]:
    """`xla.linear`, with int4 by a kernel: x [R I] -> [R O] for each weight."""
    return int4.linear_by(_int4_tiles_for, x, weights, interpret=interpret)


def linear_in_fp8(
    x: jax.Array, weights: Sequence[Weight], *, interpret: bool = False
) -> list[jax.Array]:
    """`xla.linear_in_fp8` likewise, on TPUs that multiply fp8."""
    return int4.linear_by(_int4_tiles_for, x, weights, interpret=interpret, rounds_to_fp8=True)


def _int4_tiles_for(x: jax.Array, values: jax.Array) -> int4.TilesOf | None:
    is_fit = x.dtype == jnp.bfloat16 and _fits(values[None])
    return int4_on_tpu.tiles_of if is_fit else None


def grouped(
    x: jax.Array, sizes: jax.Array, weight: Weight, *, interpret: bool = False
) -> jax.Array:
    """`xla.grouped`, which would transpose the weights [E O I] in every step: x [M I] -> [M O].

    Gradients are by megablox; for that of int8, as in `xla.product`, the weights are widened to the
    dtype of x.
    """
    if weight.is_int8_groups:
        return xla.grouped_int8_groups(partial(grouped, interpret=interpret), x, sizes, weight)
    if not _fits(weight.values):
        return xla.grouped(x, sizes, weight)
    if weight.is_int4:
        if x.dtype != jnp.bfloat16:
            return xla.grouped(x, sizes, weight)
        return int4.grouped_by(int4_on_tpu.tiles_of, grouped, x, sizes, weight, interpret=interpret)
    return _grouped(interpret, x, sizes.astype(jnp.int32), weight)


def expert_reads(sizes: Sequence[int], rows: int, weight: jax.ShapeDtypeStruct) -> float:
    """Number of experts' matrices that `grouped` reads, counted from the tiles that it fetches.

    The groups are of these sizes, in `rows` rows, against weights [E O I]. XLA's form, which takes
    weights that are no whole tiles, is counted as reading them all.
    """
    _, outputs, inputs = weight.shape
    if not _fits(weight):
        return float(len(sizes))
    inputs *= 2 if weight.dtype == QUANTIZED["int4"] else 1
    tiles = Tiles.of(rows, inputs, outputs, weight.dtype)
    fetched = fetches(sizes, tiles, inputs, outputs).weights
    return len(fetched) * tiles.inputs * tiles.outputs / (inputs * outputs)


_Residuals = tuple[jax.Array, jax.Array, Weight]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(interpret: bool, x: jax.Array, sizes: jax.Array, weight: Weight) -> jax.Array:
    _, outputs, inputs = weight.values.shape
    tiles = Tiles.of(x.shape[0], inputs, outputs, weight.values.dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        total = _product(tiles.filled(x), sizes, weight, tiles, interpret)
    return total[: x.shape[0]].astype(x.dtype)


def _grouped_forward(
    interpret: bool, x: jax.Array, sizes: jax.Array, weight: Weight
) -> tuple[jax.Array, _Residuals]:
    return _grouped(interpret, x, sizes, weight), (x, sizes, weight)


def _grouped_backward(
    interpret: bool, residuals: _Residuals, slope: jax.Array
) -> tuple[jax.Array, None, Weight]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    x, sizes, weight = residuals
    _, outputs, inputs = weight.values.shape
    is_used = jnp.arange(len(x), dtype=jnp.int32)[:, None] < jnp.sum(sizes)
    # Rows behind the last group are unspecified, and 0 x NaN is NaN.
    slope = jnp.where(is_used, slope, jnp.zeros((), slope.dtype))
    scaled = slope
    if weight.scale is not None:
        of_row = weight.scale[xla.expert_of_row(sizes, len(x))]
        scaled = (slope.astype(jnp.float32) * of_row).astype(slope.dtype)
    tiles = Tiles.of_many(len(x), outputs, inputs)
    slopes = tiles.filled(scaled)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        dx = gmm(
            slopes,
            weight.values.astype(x.dtype),
            sizes,
            preferred_element_type=x.dtype,
            tiling=tiles,
            interpret=interpret,
        )[: len(x)]
        dx = jnp.where(is_used, dx, jnp.zeros((), dx.dtype))
        if weight.scale is None:
            rows = tiles.filled(jnp.where(is_used, x, jnp.zeros((), x.dtype)))
            dw = tgmm(
                slopes.T,
                rows,
                sizes,
                preferred_element_type=weight.values.dtype,
                tiling=tiles,
                interpret=interpret,
            )
            has_rows = (sizes > 0)[:, None, None]  # others are never visited
            return dx, None, Weight(jnp.where(has_rows, dw, jnp.zeros((), dw.dtype)), None)
    ones = Weight(weight.values, jnp.ones_like(weight.scale))
    unscaled = _grouped(interpret, x.astype(jnp.float32), sizes, ones)
    d_scale = xla.gradient_of_scales(slope, unscaled, sizes)
    no_slope: Any = None if weight.is_fp8 else xla.no_gradient(weight.values)
    return dx, None, Weight(no_slope, d_scale)


_grouped.defvjp(_grouped_forward, _grouped_backward)


@partial(jax.jit, static_argnames=("tiles", "interpret"))
def _product(
    x: jax.Array, sizes: jax.Array, weight: Weight, tiles: Tiles, interpret: bool
) -> jax.Array:
    """The product of whole tiles of rows: x [M I] -> [M O].

    A tile of rows that several experts share is visited by each of them in turn and stays in near
    memory meanwhile.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    values, scale = weight
    _, outputs, inputs = values.shape
    rows, *x_scale = round_rows(x) if values.dtype == jnp.int8 else [x]
    kind = jnp.int32 if rows.dtype == jnp.int8 else jnp.float32
    steps = inputs // tiles.inputs
    walk, num_visits = Walk.of(sizes, rows.shape[0], tiles.rows)

    def kernel(walk, x, weight, *rest):  # type: ignore[no-untyped-def]
        *scales, out, total = rest
        visit, step = pl.program_id(1), pl.program_id(2)

        @pl.when(step == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        total[...] += jax.lax.dot_general(
            x[...],
            weight[...].astype(x.dtype),  # of fp8 widened, which is exact
            (((1,), (1,)), ((), ())),
            preferred_element_type=kind,
        )

        @pl.when(step == steps - 1)
        def _() -> None:
            expert = walk.expert[visit]
            place = jax.lax.broadcasted_iota(jnp.int32, total.shape, 0)
            place += walk.tile[visit] * tiles.rows
            is_mine = (place >= walk.starts[expert]) & (place < walk.starts[expert + 1])
            scaled = total[...].astype(jnp.float32)
            if scales:
                scaled *= math.prod(factor[...] for factor in scales)
            out[...] = jnp.where(is_mine, scaled, out[...].astype(jnp.float32)).astype(out.dtype)

    mapped = {
        "x": lambda column, visit, step, walk: (walk.tile[visit], step),
        "weight": lambda column, visit, step, walk: (walk.expert[visit], column, step),
        "x_scale": lambda column, visit, step, walk: (walk.tile[visit], 0),
        "scale": lambda column, visit, step, walk: (walk.expert[visit], 0, column),
        "out": lambda column, visit, step, walk: (walk.tile[visit], column),
    }
    specs = [
        pl.BlockSpec((tiles.rows, tiles.inputs), mapped["x"]),
        pl.BlockSpec((None, tiles.outputs, tiles.inputs), mapped["weight"]),
    ]
    scales = [factor[:, None] for factor in x_scale]
    if x_scale:
        specs.append(pl.BlockSpec((tiles.rows, 1), mapped["x_scale"]))
    if scale is not None:
        specs.append(pl.BlockSpec((None, 1, tiles.outputs), mapped["scale"]))
        scales.append(scale[:, None])
    if not interpret:
        # XLA would fetch all experts into near memory while it computes something else.
        values = pltpu.with_memory_space_constraint(values, pltpu.HBM)
    total: jax.Array = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], outputs), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=specs,
            out_specs=pl.BlockSpec((tiles.rows, tiles.outputs), mapped["out"]),
            grid=(outputs // tiles.outputs, num_visits, steps),
            scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.outputs), kind)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="grouped_int8" if x_scale else "grouped_floats",
    )(walk, rows, values, *scales)
    return total
