"""Pieces: parameters cut as the checkpoint stores them, moved one at a time through two buffers.

A piece is one stored chunk, so it is read or written once and whole. It is also one run of elements
of the flattened parameter, so what belongs to which tensor elsewhere is arithmetic on ranges. Both
ways through, from a source and to an export, work on pieces; neither ever holds more than two.
"""

import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from convert.errors import ConversionError
from convert.name_table import Row
from mixtral_jax.checkpoint.folder import chunk_shape


@dataclass(frozen=True)
class Piece:
    """One stored chunk of a parameter."""

    parameter: str
    index: tuple[slice, ...]  # where it is in the parameter
    shape: tuple[int, ...]
    start: int  # its first element in the flattened parameter

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Overlap(NamedTuple):
    """A run of elements that a piece and a row have in common."""

    row: Row
    start: int  # first element, counted from the row's first
    within: slice  # of the flattened piece


def total_bytes(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """What the parameters take, stored."""
    return sum(array.size * np.dtype(array.dtype).itemsize for array in shapes.values())


def check_space(nbytes: int, destination: Path) -> None:
    """Raises ConversionError if that many bytes do not fit where `destination` will be."""
    folder = destination.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise ConversionError(
            [f"{destination} needs {nbytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there"]
        )


def pieces(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[Piece]:
    """All pieces of all parameters in the order of their elements."""
    for name, array in shapes.items():
        chunk = chunk_shape(array)
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(len(chunk))]
        grid = [range(0, size, step) for size, step in zip(array.shape, chunk, strict=True)]
        for corner in itertools.product(*grid):
            ends = [
                min(begin + step, size)
                for begin, step, size in zip(corner, chunk, array.shape, strict=True)
            ]
            yield Piece(
                name,
                tuple(map(slice, corner, ends)),
                tuple(end - begin for begin, end in zip(corner, ends, strict=True)),
                sum(begin * stride for begin, stride in zip(corner, strides, strict=True)),
            )


def overlaps(piece: Piece, rows: Iterable[Row]) -> Iterator[Overlap]:
    """What each of a parameter's rows has in common with one of its pieces."""
    for row in rows:
        first = row.index * row.size
        begin = max(first, piece.start)
        end = min(first + row.size, piece.start + piece.size)
        if begin < end:
            yield Overlap(row, begin - first, slice(begin - piece.start, end - piece.start))


def filled(
    cut: Iterable[Piece], dtype: np.dtype, fill: Callable[[Piece, np.ndarray], None]
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece with its elements, flat, while another thread fills the next one.

    `fill` puts a piece's elements into the flat array that it is given. An array is valid until
    the next one is asked for: there are two of them, used in turn, because fresh memory costs as
    much time as copying into it.
    """
    buffers = [np.empty(0, dtype), np.empty(0, dtype)]

    def run(piece: Piece, turn: int) -> tuple[Piece, np.ndarray]:
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
