"""Products of rows in groups on TPU, by megablox and a kernel of ours for int8.

Sizes of blocks are always given: left out, the kernels would ask the default device, which is
another one where programs are compiled for hardware that is elsewhere.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.kernels.tpu.tiles import LANES, largest_tile
from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.weight import Weight, round_rows


def _fits(weight: Weight) -> bool:
    """Says whether a kernel takes such rows and weights: whole tiles."""
    outputs, inputs = weight.values.shape[1:]
    return outputs % LANES == 0 == inputs % LANES


def grouped(
    x: jax.Array, sizes: jax.Array, weight: Weight, *, interpret: bool = False
) -> jax.Array:
    """`xla.grouped`, which would transpose the weights [E O I] in every step: x [M I] -> [M O].

    Floats are multiplied by megablox, int8 by a kernel of the same walk over tiles. Gradients are
    by megablox; for that of int8, as in `xla.product`, the weights are widened to the dtype of x.
    """
    if weight.is_fp8 or not _fits(weight):
        return xla.grouped(x, sizes, weight)
    return _grouped(interpret, x, sizes.astype(jnp.int32), weight)


_Residuals = tuple[jax.Array, jax.Array, Weight]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(interpret: bool, x: jax.Array, sizes: jax.Array, weight: Weight) -> jax.Array:
    product = _grouped_floats if weight.scale is None else _grouped_int8
    padded = _padded(x)
    _, outputs, inputs = weight.values.shape
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        total = product(padded, sizes, weight, _Tiles.of(padded, inputs, outputs), interpret)
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
    slopes = _padded(scaled)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        dx = gmm(
            slopes,
            weight.values.astype(x.dtype),
            sizes,
            preferred_element_type=x.dtype,
            tiling=_Tiles.of(slopes, outputs, inputs),
            interpret=interpret,
        )[: len(x)]
        dx = jnp.where(is_used, dx, jnp.zeros((), dx.dtype))
        if weight.scale is None:
            rows = _padded(jnp.where(is_used, x, jnp.zeros((), x.dtype)))
            dw = tgmm(
                slopes.T,
                rows,
                sizes,
                preferred_element_type=weight.values.dtype,
                tiling=_Tiles.of(slopes, outputs, inputs),
                interpret=interpret,
            )
            has_rows = (sizes > 0)[:, None, None]  # others are never visited
            return dx, None, Weight(jnp.where(has_rows, dw, jnp.zeros((), dw.dtype)), None)
    ones = Weight(weight.values, jnp.ones_like(weight.scale))
    unscaled = _grouped(interpret, x.astype(jnp.float32), sizes, ones)
    d_scale = xla.gradient_of_scales(slope, unscaled, sizes)
    return dx, None, Weight(xla.no_gradient(weight.values), d_scale)


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _padded(x: jax.Array) -> jax.Array:
    """Rows filled up to whole tiles."""
    return jnp.pad(x, ((0, -x.shape[0] % LANES), (0, 0)))


class _Tiles(NamedTuple):
    rows: int
    inputs: int
    outputs: int

    @classmethod
    def of(cls, rows: jax.Array, inputs: int, outputs: int) -> "_Tiles":
        """The tiles of a product of padded rows."""
        sizes = (
            largest_tile(rows.shape[0], 512),
            *(largest_tile(n, 1024) for n in (inputs, outputs)),
        )
        return cls(*sizes)


def _grouped_floats(
    x: jax.Array, sizes: jax.Array, weight: Weight, tiles: _Tiles, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    total: jax.Array = gmm(
        x,
        weight.values,
        sizes,
        preferred_element_type=x.dtype,  # each tile is summed up in float32
        tiling=tiles,
        transpose_rhs=True,
        interpret=interpret,
    )
    return total


def _grouped_int8(
    x: jax.Array, sizes: jax.Array, weight: Weight, tiles: _Tiles, interpret: bool
) -> jax.Array:
    """Megablox's order of tiles: a tile of rows that several experts share is visited by each of
    them in turn and stays in near memory meanwhile."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

    assert weight.scale is not None
    rows, x_scale = round_rows(x)
    experts, outputs, inputs = weight.values.shape
    steps = inputs // tiles.inputs
    # Row where each group starts; expert and tile of rows of each visit.
    walk, num_visits = make_group_metadata(
        group_sizes=sizes,
        m=rows.shape[0],
        tm=tiles.rows,
        start_group=jnp.zeros((), jnp.int32),
        num_nonzero_groups=experts,
        visit_empty_groups=False,
    )

    def kernel(walk, x, x_scale, weight, scale, out, total):  # type: ignore[no-untyped-def]
        starts, expert_of, tile_of = walk
        visit, step = pl.program_id(1), pl.program_id(2)

        @pl.when(step == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        total[...] += jax.lax.dot_general(
            x[...], weight[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )

        @pl.when(step == steps - 1)
        def _() -> None:
            expert = expert_of[visit]
            place = jax.lax.broadcasted_iota(jnp.int32, total.shape, 0)
            place += tile_of[visit] * tiles.rows
            is_mine = (place >= starts[expert]) & (place < starts[expert + 1])
            scaled = total[...].astype(jnp.float32) * (x_scale[...] * scale[...])
            out[...] = jnp.where(is_mine, scaled, out[...].astype(jnp.float32)).astype(out.dtype)

    mapped = {
        "x": lambda column, visit, step, walk: (walk[2][visit], step),
        "x_scale": lambda column, visit, step, walk: (walk[2][visit], 0),
        "weight": lambda column, visit, step, walk: (walk[1][visit], column, step),
        "scale": lambda column, visit, step, walk: (walk[1][visit], 0, column),
        "out": lambda column, visit, step, walk: (walk[2][visit], column),
    }
    total: jax.Array = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], outputs), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[
                pl.BlockSpec((tiles.rows, tiles.inputs), mapped["x"]),
                pl.BlockSpec((tiles.rows, 1), mapped["x_scale"]),
                pl.BlockSpec((None, tiles.outputs, tiles.inputs), mapped["weight"]),
                pl.BlockSpec((None, 1, tiles.outputs), mapped["scale"]),
            ],
            out_specs=pl.BlockSpec((tiles.rows, tiles.outputs), mapped["out"]),
            grid=(outputs // tiles.outputs, num_visits, steps),
            scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.outputs), jnp.int32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="grouped_int8",
    )(walk, rows, x_scale[:, None], weight.values, weight.scale[:, None])
    return total
