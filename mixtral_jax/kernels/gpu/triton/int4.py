"""Products with int4 weights on GPU, in Pallas by way of Triton: a tile widens what it multiplies.

Weights go from memory to shared memory as they lie and are widened in registers, in the layout in
which they are multiplied: in words of 32 bits, which have eight inputs in a row, the first in the
lowest bits. A group's scale is the lower half of another word, its minimum the upper one. Rows
stand in eight planes of which each has every eighth input, so that a plane meets the same four bits
of every word and nothing need be interleaved.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, UInt32

from mixtral_jax.kernels.gpu.triton.walk import Walk
from mixtral_jax.weight import GROUP_SIZE, Weight

_IN_WORD = 8  # inputs
_WORDS_OF_GROUP = GROUP_SIZE // _IN_WORD
WIDTH = 128  # that tiles of every size divide, in both directions
# Programs that keep all of a card's memory busy: some for each of an H100's 132 multiprocessors.
_PROGRAMS = 384


class _Tiles(NamedTuple):
    """Sizes of the tiles of a product, and how many of a program's tiles are fetched ahead.

    Where rows are few and outputs as well, several programs share a tile's inputs (`splits`), so
    that enough of them read from memory; their sums are added up behind.
    """

    rows: int
    outputs: int
    words: int
    splits: int
    stages: int = 4

    @classmethod
    def of(cls, rows: int, words: int, outputs: int) -> "_Tiles":
        """The tiles for so many rows in all groups together and weights of so many words."""
        if rows > 64:
            return cls(64, 128, 16, 1, 3)
        size = cls(16 if rows <= 16 else 32, 64, 16 if words % 32 else 32, 1)
        steps, columns, splits = words // size.words, outputs // size.outputs, 1
        while columns * splits < _PROGRAMS and steps % (4 * splits) == 0:
            splits *= 2
        return size._replace(splits=splits)


def tile_rows(rows: int) -> int:
    """The rows of a tile, for so many rows in all groups together."""
    return _Tiles.of(rows, 32, WIDTH).rows


def tiles_of(x: jax.Array, sizes: jax.Array | None, weight: Weight, interpret: bool) -> jax.Array:
    """`int4.TilesOf`."""
    rows, outputs = x.shape[0], weight.values.shape[1]
    words, pairs = words_of(weight)
    size = _Tiles.of(rows, words.shape[2], outputs)
    walk = Walk.of(sizes, rows, size.rows)
    shape, dtype = (size.splits, rows, outputs), x.dtype if size.splits == 1 else jnp.float32
    out: jax.Array = pl.pallas_call(
        partial(_tile, size=size),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        grid=(len(walk.expert), outputs // size.outputs, size.splits),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=size.stages),
        interpret=interpret,
        name="int4_product",
    )(planes_of(x), words, pairs, *walk)
    return out[0] if size.splits == 1 else jnp.sum(out, axis=0).astype(x.dtype)


def _tile(x, words, pairs, expert, first, end, out, *, size):  # type: ignore[no-untyped-def]
    tile, column, split = (pl.program_id(axis) for axis in range(3))
    steps = words.shape[2] // size.words // size.splits
    places = pl.ds(first[tile], size.rows)
    is_mine = first[tile] + jnp.arange(size.rows, dtype=jnp.int32) < end[tile]
    columns = pl.ds(column * size.outputs, size.outputs)
    # Weights that are multiplied from registers are the left side, where cards have such products.
    is_left = size.rows >= 64

    def step(i, total):  # type: ignore[no-untyped-def]
        inputs = pl.ds(i * size.words, size.words)
        of_step = size.words // _WORDS_OF_GROUP
        of_groups = pairs[expert[tile], columns, pl.ds(i * of_step, of_step)]
        of_words = (size.outputs, of_step, _WORDS_OF_GROUP)
        of_groups = jnp.broadcast_to(of_groups[:, :, None], of_words)
        scale, base = scale_and_base(of_groups.reshape(size.outputs, size.words))
        block = words[expert[tile], columns, inputs]
        for plane in range(_IN_WORD):
            own = pl.ds(plane * words.shape[2] + i * size.words, size.words)
            rows = plgpu.load(x.at[places, own], mask=is_mine[:, None], other=0)
            wide = (raised_level(block, plane) * scale + base).astype(rows.dtype)
            sides = (wide, rows) if is_left else (rows, wide)
            total += jax.lax.dot_general(
                *sides, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
        return total

    @pl.when(first[tile] < end[tile])
    def _() -> None:
        shape = (size.outputs, size.rows) if is_left else (size.rows, size.outputs)
        total = jnp.zeros(shape, jnp.float32)
        total = jax.lax.fori_loop(split * steps, (split + 1) * steps, step, total)
        total = total.T if is_left else total
        plgpu.store(out.at[split, places, columns], total.astype(out.dtype), mask=is_mine[:, None])


def words_of(weight: Weight) -> tuple[UInt32[jax.Array, "E O _"], UInt32[jax.Array, "E O G"]]:
    """Words of eight weights, and of the scale and minimum of a group, of a weight [E O I]."""
    assert weight.scale is not None
    experts, outputs, _ = weight.values.shape
    whole = jnp.uint32
    values = weight.values.reshape(experts, outputs, -1, _IN_WORD // 2)
    return (
        jax.lax.bitcast_convert_type(values, whole),
        jax.lax.bitcast_convert_type(weight.scale, whole),
    )


def planes_of(x: Float[jax.Array, "M I"]) -> Float[jax.Array, "M I"]:
    """Rows as eight planes side by side, of which the k-th has the k-th input of every word."""
    return jnp.swapaxes(x.reshape(x.shape[0], -1, _IN_WORD), 1, 2).reshape(x.shape)


# The float32 of these bits is 16: its fraction has room for a level, whose value it then adds.
_SIXTEEN = 0x41800000
_PLACE = 19  # of a level in that fraction


def raised_level(words: jax.Array, plane: int) -> jax.Array:
    """16 and the level of a plane's input in each word, as float32: a shift and two masks."""
    shift = _IN_WORD // 2 * plane - _PLACE
    count = jnp.uint32(abs(shift))
    bits = words >> count if shift > 0 else words << count
    bits = bits & jnp.uint32(15 << _PLACE) | jnp.uint32(_SIXTEEN)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def scale_and_base(pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scale of each pair, and the base for which `raised_level * scale + base` is a weight."""
    halves = (pairs.astype(jnp.uint16), (pairs >> jnp.uint32(16)).astype(jnp.uint16))
    scale, minimum = (
        jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) for half in halves
    )
    return scale, minimum - 16 * scale
