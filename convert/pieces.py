"""Pieces: parameters cut as the checkpoint stores them, moved one at a time through two buffers.

A piece is one stored chunk, so it is read or written once and whole. It is also one run of elements
of the flattened parameter, so its place in tensors elsewhere is arithmetic on ranges. Conversion
and export both work on pieces; neither ever holds more than two.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from convert.name_table import Row
from convert.progress import Progress
from mixtral_jax.checkpoint.parameters import CHUNK_BYTES, chunk_shape, stored_bytes
from mixtral_jax.checkpoint.writer import ParameterWriter


@dataclass(frozen=True)
class ParameterPiece:
    """One stored chunk of a parameter."""

    parameter: str
    index: tuple[slice, ...]  # where it is in the parameter
    shape: tuple[int, ...]
    start: int  # its first element in the flattened parameter

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Fill = Callable[[ParameterPiece, np.ndarray], None]
"""Puts the elements of a piece into a flat array."""


class Overlap(NamedTuple):
    """A run of elements that a piece and a row have in common."""

    row: Row
    start: int  # first element, counted from the row's first
    within: slice  # of the flattened piece


def pieces(
    shapes: Mapping[str, jax.ShapeDtypeStruct], chunk_bytes: int = CHUNK_BYTES
) -> Iterator[ParameterPiece]:
    """Yields all pieces of all parameters in the order of their elements.

    `chunk_bytes` is that of the checkpoint, see `chunk_shape`.
    """
    for name, array in shapes.items():
        chunk = chunk_shape(array, chunk_bytes)
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(len(chunk))]
        grid = [range(0, size, step) for size, step in zip(array.shape, chunk, strict=True)]
        for corner in itertools.product(*grid):
            ends = [
                min(begin + step, size)
                for begin, step, size in zip(corner, chunk, array.shape, strict=True)
            ]
            yield ParameterPiece(
                name,
                tuple(map(slice, corner, ends)),
                tuple(end - begin for begin, end in zip(corner, ends, strict=True)),
                sum(begin * stride for begin, stride in zip(corner, strides, strict=True)),
            )


def overlaps(piece: ParameterPiece, rows: Iterable[Row]) -> Iterator[Overlap]:
    """Yields the elements that a piece has in common with each of its parameter's rows."""
    for row in rows:
        first = row.index * row.size
        begin = max(first, piece.start)
        end = min(first + row.size, piece.start + piece.size)
        if begin < end:
            yield Overlap(row, begin - first, slice(begin - piece.start, end - piece.start))


def filled(
    cut: Iterable[ParameterPiece], dtype: np.dtype, fill: Fill
) -> Iterator[tuple[ParameterPiece, np.ndarray]]:
    """Yields each piece with its elements, flat, while another thread fills the next one.

    `fill` puts a piece's elements into the flat array that it is given. An array is valid until
    the next one is asked for: there are two of them, used in turn, because fresh memory costs as
    much time as copying into it.
    """
    buffers = [np.empty(0, dtype), np.empty(0, dtype)]

    def run(piece: ParameterPiece, turn: int) -> tuple[ParameterPiece, np.ndarray]:
        if buffers[turn].size < piece.size:
            buffers[turn] = np.empty(piece.size, dtype)
        out = buffers[turn][: piece.size]
        fill(piece, out)
        return piece, out

    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = None
        for turn, piece in zip(itertools.cycle((0, 1)), cut, strict=False):
            following = pool.submit(run, piece, turn)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def write_pieces(writer: ParameterWriter, dtype: np.dtype, fill: Fill, progress: Progress) -> None:
    """Writes all parameters of a checkpoint of the float `dtype`, with the elements of `fill`."""
    done, total = 0, stored_bytes(writer.shapes)
    progress(done, total)
    for piece, values in filled(pieces(writer.shapes, writer.chunk_bytes), dtype, fill):
        writer.write(piece.parameter, piece.index, values.reshape(piece.shape))
        done += values.nbytes
        progress(done, total)
