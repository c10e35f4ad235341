"""Products with int4 weights on TPU: a kernel that widens a tile of weights where it multiplies.

A tile of weights lies in near memory as bytes of which four outputs share a word of 32 bits, so
each of a word's eight levels is cut out of all words at once and outputs stand in the order
0 4 8 .. 1 5 9 .. until the end. A weight is `(level - 8) * scale + base`: the first part is rounded
to bfloat16 and multiplied, and the base, one for each group of 32 inputs, is multiplied with the
sum of the group's inputs. Weights pass through the unit of products, in which rows stand still.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mixtral_jax.kernels.tpu.tiles import LANES, Tiles
from mixtral_jax.kernels.tpu.walk import Walk
from mixtral_jax.weight import GROUP_SIZE, Weight

# Inputs whose bytes fill a register's lanes, and their groups.
_STEP, _GROUPS = 2 * LANES, 2 * LANES // GROUP_SIZE
_FULL = 16  # rows of bfloat16 that fill a register
_IN_WORD = 4  # outputs
# Steps along the inputs whose instructions the compiler may mix, as each waits for its products.
_UNROLLED = 8


def fits(values: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Says whether the kernel takes such weights [E O I/2]: whole tiles."""
    _, outputs, half = values.shape
    return outputs % LANES == 0 == 2 * half % _STEP


def tiles_of(x: jax.Array, sizes: jax.Array | None, weight: Weight, interpret: bool) -> jax.Array:
    """`int4.TilesOf` for rows of bfloat16."""
    given = jnp.full(1, x.shape[0], jnp.int32) if sizes is None else sizes
    _, outputs, half = weight.values.shape
    tiles = Tiles.of(x.shape[0], 2 * half, outputs, weight.values.dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return _product(x, given, weight, tiles, interpret)[: x.shape[0]]


@partial(jax.jit, static_argnames=("tiles", "interpret"))
def _product(
    x: jax.Array, sizes: jax.Array, weight: Weight, tiles: Tiles, interpret: bool
) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    values, outputs = weight.values, weight.values.shape[1]
    x = jnp.pad(x, ((0, -x.shape[0] % tiles.rows), (0, 0)))
    rows, inputs = x.shape
    halves = jnp.moveaxis(x.reshape(rows, -1, 2), 2, 0)
    pairs, is_minor = _pairs(weight)
    steps, groups = inputs // tiles.inputs, tiles.inputs // GROUP_SIZE
    walk, num_visits = Walk.of(sizes, rows, tiles.rows)
    if not interpret:
        # XLA would fetch all experts into near memory while it computes something else.
        values = pltpu.with_memory_space_constraint(values, pltpu.HBM)

    def of_pairs(column, visit, step, walk):  # type: ignore[no-untyped-def]
        place = (column, 0, step) if is_minor else (step, 0, column)
        return walk.expert[visit], *place

    of_tile = (tiles.outputs, 2, groups) if is_minor else (groups, 2, tiles.outputs)
    total: jax.Array = pl.pallas_call(
        partial(_tile, tiles=tiles, steps=steps, is_minor=is_minor),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[
                pl.BlockSpec(
                    (2, tiles.rows, inputs // 2),
                    lambda column, visit, step, walk: (0, walk.tile[visit], 0),
                ),
                pl.BlockSpec(
                    (None, tiles.outputs, tiles.inputs // 2),
                    lambda column, visit, step, walk: (walk.expert[visit], column, step),
                ),
                pl.BlockSpec((1, *of_tile), of_pairs),
            ],
            out_specs=pl.BlockSpec(
                (tiles.rows, tiles.outputs),
                lambda column, visit, step, walk: (walk.tile[visit], column),
            ),
            grid=(outputs // tiles.outputs, num_visits, steps),
            scratch_shapes=[
                pltpu.VMEM((tiles.outputs, tiles.rows), jnp.float32),
                pltpu.VMEM((LANES, tiles.rows), jnp.float32),
                pltpu.VMEM((tiles.outputs, LANES), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        ),
        interpret=interpret,
        name="int4_product",
    )(walk, halves, values, pairs)
    return total


def _pairs(weight: Weight) -> tuple[jax.Array, bool]:
    """Scales and minima [E O G 2] as bits, in the order in which XLA lays them out.

    XLA puts an axis of whole registers last, and the pairs before it: the groups, if so (True), or
    the outputs. Kernels take no float16.
    """
    assert weight.scale is not None
    is_minor = weight.scale.shape[2] % LANES == 0
    bits = jax.lax.bitcast_convert_type(weight.scale, jnp.uint16)
    return bits.transpose((0, 1, 3, 2) if is_minor else (0, 2, 3, 1)), is_minor


def _tile(  # type: ignore[no-untyped-def]
    walk, x, values, pairs, out, total, sums, table, *, tiles, steps, is_minor
):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    visit, step = pl.program_id(1), pl.program_id(2)
    wide, narrow = jnp.float32, jnp.bfloat16
    in_order = tiles.outputs // _IN_WORD
    turns = range(_IN_WORD)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    words = pairs.bitcast(jnp.uint32)[0]
    groups = tiles.inputs // GROUP_SIZE
    words = words.reshape(tiles.outputs, groups) if is_minor else words.reshape(groups, -1).T
    words = jnp.pad(words, ((0, 0), (0, LANES - groups)))
    table[...] = jax.lax.bitcast_convert_type(words, wide)
    words = jnp.concatenate([table[pl.ds(turn, in_order, _IN_WORD), :] for turn in turns])
    words = jax.lax.bitcast_convert_type(words, jnp.int32)
    scale, minimum = float_of_half(words & 0xFFFF), float_of_half((words >> 16) & 0xFFFF)
    table[...] = scale
    base = minimum + 8 * scale

    own = jax.lax.broadcasted_iota(jnp.int32, (_FULL, LANES), 0)
    place = jax.lax.broadcasted_iota(jnp.int32, (_FULL, LANES), 1) // (LANES // _GROUPS)
    is_own = jnp.where(own == place, 1.0, 0.0).astype(narrow)
    lane = jax.lax.broadcasted_iota(jnp.int32, (tiles.outputs, LANES), 1) // (LANES // _GROUPS)

    def multiply(i, _):  # type: ignore[no-untyped-def]
        inputs = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        at = pl.multiple_of(step * (tiles.inputs // 2) + i * LANES, LANES)
        # A level with its highest bit turned is `level - 8` in two's complement.
        bits = pltpu.bitcast(values[:, inputs], jnp.int32) ^ jnp.int32(-0x77777778)
        factor = jnp.take_along_axis(table[...], lane + i * _GROUPS, axis=1)
        product = jnp.zeros((tiles.outputs + _FULL, tiles.rows), wide)
        for odd in range(2):
            levels = [(bits << (28 - 8 * turn - 4 * odd)) >> 28 for turn in turns]
            weights = (jnp.concatenate(levels).astype(wide) * factor).astype(narrow)
            product += jax.lax.dot_general(
                jnp.concatenate([weights, is_own]),
                x[odd, :, pl.ds(at, LANES)],
                (((1,), (1,)), ((), ())),
                preferred_element_type=wide,
            )
        total[...] += product[: tiles.outputs]
        of_groups = pl.ds(pl.multiple_of(i * _GROUPS, _GROUPS), _GROUPS)
        sums[of_groups, :] = product[tiles.outputs : tiles.outputs + _GROUPS]
        return 0

    jax.lax.fori_loop(0, tiles.inputs // _STEP, multiply, 0, unroll=_UNROLLED)
    used = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 0) < groups
    summed = jnp.where(used, sums[...], 0)
    for ours, theirs in ((0, 0), (0, 1), (1, 0)):
        total[...] += jax.lax.dot_general(
            _parts(base)[ours],
            _parts(summed)[theirs],
            (((1,), (0,)), ((), ())),
            preferred_element_type=wide,
        )

    @pl.when(step == steps - 1)
    def _() -> None:
        expert = walk.expert[visit]
        row = jax.lax.broadcasted_iota(jnp.int32, out.shape, 0) + walk.tile[visit] * tiles.rows
        is_mine = (row >= walk.starts[expert]) & (row < walk.starts[expert + 1])
        turned = total[...]
        for turn in turns:
            own = turned[turn * in_order : (turn + 1) * in_order]
            total[pl.ds(turn, in_order, _IN_WORD), :] = own
        out[...] = jnp.where(is_mine, total[...].T, out[...].astype(wide)).astype(out.dtype)


def float_of_half(bits: jax.Array) -> jax.Array:
    """The float32 of a finite float16, whose bits stand in the lower half of a word: exact."""
    size = bits & 0x7FFF
    moved = (size << 13) + (112 << 23)
    # The smallest ones have no leading one: it is added, and taken off again as a float.
    small = jax.lax.bitcast_convert_type(moved + (1 << 23), jnp.float32) - 2.0**-14
    value = jnp.where(size < 0x400, small, jax.lax.bitcast_convert_type(moved, jnp.float32))
    return jnp.where(bits != size, -value, value)


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two of bfloat16 whose sum is x up to 17 bits."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
