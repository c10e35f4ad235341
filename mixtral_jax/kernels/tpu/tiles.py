"""Tiles that a TPU's kernels work in, and which of them a grouped product fetches.

A grouped product walks over columns of tiles of the weights, in each over visits, and in each visit
over steps along the inputs. A visit is an expert with a tile of rows of which some are its own: an
expert without rows has none. A tile whose numbers are those of the step before is not fetched
again, so the order of the walk and the sizes of tiles say what is read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mixtral_jax.weight import GROUP_SIZE, QUANTIZED

LANES = 128  # the last axis of a tile
_ROW_BYTES, _WEIGHT_BYTES = 2 << 20, 2 << 20  # of a tile, of which a kernel holds two
_MOST_ROWS = 512  # of a tile


def largest_tile(size: int, limit: int) -> int:
    """The largest multiple of LANES up to `limit` that divides `size` evenly."""
    return next(tile for tile in range(limit, 0, -LANES) if size % tile == 0)


class Tiles(NamedTuple):
    """Sizes of the tiles of a grouped product."""

    rows: int
    inputs: int
    outputs: int

    @classmethod
    def of(cls, rows: int, inputs: int, outputs: int, dtype: DTypeLike) -> "Tiles":
        """The tiles for `rows` rows against experts of a dtype.

        Rows that meet int8 are int8, and those that meet fp8 bfloat16.

        Few rows are one tile as it is, with all their inputs: then each expert that has rows is
        visited once, and rows are read once. Many are filled up to tiles of up to 512.
        """
        if jnp.dtype(dtype) == QUANTIZED["int4"]:
            return cls.of_int4(rows, inputs, outputs)
        size = jnp.dtype(dtype).itemsize
        row_size = 2 if jnp.dtype(dtype) == jnp.float8_e4m3fn else size
        full = 32 // row_size  # rows that fill a register of near memory
        few = -(-rows // full) * full
        whole = max(LANES, _WEIGHT_BYTES // (inputs * size) // LANES * LANES)
        is_small = few * inputs * row_size <= _ROW_BYTES
        if few <= _MOST_ROWS and is_small and whole * inputs * size <= 2 * _WEIGHT_BYTES:
            return cls(few, inputs, largest_tile(outputs, whole))
        return cls.of_many(rows, inputs, outputs)

    @classmethod
    def of_many(cls, rows: int, inputs: int, outputs: int) -> "Tiles":
        """Tiles of whole lanes in both directions, which gradients need as well."""
        filled = -(-rows // LANES) * LANES
        sizes = (largest_tile(n, 1024) for n in (inputs, outputs))
        return cls(largest_tile(filled, _MOST_ROWS), *sizes)

    @classmethod
    def of_int4(cls, rows: int, inputs: int, outputs: int) -> "Tiles":
        """The tiles for rows of bfloat16 against int4, of which up to 128 are one tile.

        Rows stand still where products are made, and 128 of them take as long as one. Inputs are
        whole registers of bytes, as many as have a register of groups at most.
        """
        few = -(-rows // 16) * 16 if rows <= LANES else LANES
        limit = LANES * GROUP_SIZE
        parts = range(-(-inputs // limit), inputs)
        steps = next(n for n in parts if inputs % (n * 2 * LANES) == 0)
        return cls(few, inputs // steps, largest_tile(outputs, 2 * LANES))

    def filled(self, x: jax.Array) -> jax.Array:
        """The rows x [M I] with zeros behind them up to a whole tile."""
        return jnp.pad(x, ((0, -x.shape[0] % self.rows), (0, 0)))


class Fetches(NamedTuple):
    """The tiles that a grouped product fetches, in order."""

    weights: list[tuple[int, int, int]]  # expert, column, step
    rows: list[tuple[int, int]]  # tile of rows, step


def visits(sizes: Sequence[int], tile: int) -> list[tuple[int, int]]:
    """The (expert, tile of rows) pairs that share rows, for groups of these sizes.

    These are megablox's: with tiles of 8 rows the groups 3, 0 and 7 are rows 0-2 and 3-9, so
    (0, 0), (2, 0) and (2, 1).
    """
    pairs, start = [], 0
    for expert, size in enumerate(sizes):
        if size:
            pairs += [(expert, i) for i in range(start // tile, (start + size - 1) // tile + 1)]
        start += size
    return pairs


def fetches(sizes: Sequence[int], tiles: Tiles, inputs: int, outputs: int) -> Fetches:
    """The walk of a product of rows in groups [M I] with experts [E O I], tile by tile."""
    fetched = Fetches([], [])
    for column in range(outputs // tiles.outputs):
        for expert, tile in visits(sizes, tiles.rows):
            for step in range(inputs // tiles.inputs):
                if fetched.weights[-1:] != [(expert, column, step)]:
                    fetched.weights.append((expert, column, step))
                if fetched.rows[-1:] != [(tile, step)]:
                    fetched.rows.append((tile, step))
    return fetched
