"""Products of rows in groups on TPU, by megablox and a kernel of ours for int8.

Sizes of blocks are always given: left out, the kernels would ask the default device, which is
another one where programs are compiled for hardware that is elsewhere.
"""

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

    Floats are multiplied by megablox, int8 by a kernel of the same walk over tiles.
    """
    if not _fits(weight):
        return xla.grouped(x, sizes, weight)
    padded = jnp.pad(x, ((0, -x.shape[0] % LANES), (0, 0)))
    _, outputs, inputs = weight.values.shape
    tiles = _Tiles(
        largest_tile(padded.shape[0], 512), largest_tile(inputs, 1024), largest_tile(outputs, 1024)
    )
    sizes = sizes.astype(jnp.int32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        product = _grouped_floats if weight.scale is None else _grouped_int8
        total = product(padded, sizes, weight, tiles, interpret)
    return total[: x.shape[0]].astype(x.dtype)


class _Tiles(NamedTuple):
    rows: int
    inputs: int
    outputs: int


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
