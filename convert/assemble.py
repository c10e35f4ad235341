"""Pieces of parameters, assembled from a source's tensors by the table."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import numpy as np

from convert.name_table import NameTable
from convert.pieces import ParameterPiece, overlaps
from convert.source.read import Reader, Tensor

_ROUTER_DEVIATION = 0.02  # of initial weights, as Hugging Face's `initializer_range`


class Assembly:
    """Fills pieces with the elements that the table names; a context manager over the files.

    Args:
        tensors: the source's, by name; all that the table names, and readable.
        table: which elements go where.
        seed: of the random routers of a model that becomes a mixture of experts.
    """

    def __init__(self, tensors: Mapping[str, Tensor], table: NameTable, seed: int = 0) -> None:
        self._tensors = tensors
        self._rows = table.by_parameter
        self._head_size = table.config.head_size
        self._routers = np.random.default_rng(seed)
        self._reader = Reader()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reader.__exit__(kind, error, trace)

    def fill(self, piece: ParameterPiece, out: np.ndarray) -> None:
        """Puts the elements of a piece into `out`, flat, f32 or bf16. For one thread at a time.

        Or float8_e4m3fn as it is stored, for a parameter that has `stored_scales`.
        """
        rows = self._rows.get(piece.parameter)
        if rows is None:  # the router of an upcycled model: as a new one is initialised
            out[...] = _ROUTER_DEVIATION * self._routers.standard_normal(out.size, np.float32)
            return
        for row, start, within in overlaps(piece, rows):
            tensor = self._tensors[row.source]
            if row.interleaved:
                self._read_interleaved(tensor, row.start + start, out[within])
            else:
                self._reader.read(tensor, row.start + start, out[within])

    def stored_scales(self, parameter: str) -> np.ndarray | None:
        """The scales f32 [*E*O] of a parameter all of whose tensors are FP8 with one for a row.

        None for any other parameter. Not while another thread fills.
        """
        rows = sorted(self._rows.get(parameter, []), key=lambda row: row.index)
        if not rows or not all(self._tensors[row.source].has_scales_of_rows for row in rows):
            return None
        scales = []
        for row in rows:
            of_rows = self._reader.scales_of_rows(self._tensors[row.source])
            if row.interleaved:
                of_rows = of_rows.reshape(-1, self._head_size // 2, 2).swapaxes(1, 2).reshape(-1)
            scales.append(of_rows)
        return np.concatenate(scales)

    def _read_interleaved(self, tensor: Tensor, start: int, out: np.ndarray) -> None:
        """Reads whole heads [H D], turning rows 0 1 2 3 4 5 into 0 2 4 1 3 5."""
        head_size, columns = self._head_size, tensor.shape[-1]
        # A piece cuts within a head only if a single head is larger than a piece.
        assert start % (head_size * columns) == 0 and out.size % (head_size * columns) == 0
        stored = np.empty_like(out)
        self._reader.read(tensor, start, stored)
        pairs = stored.reshape(-1, head_size // 2, 2, columns)
        out.reshape(-1, 2, head_size // 2, columns)[...] = pairs.swapaxes(1, 2)
