"""Pieces of parameters, assembled from a source's tensors by the table."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np

from convert.name_table import NameTable, Row
from convert.pieces import ParameterPiece, overlaps
from convert.source.read import Reader
from convert.source.tensor import Tensor
from mixtral_jax.weight import GROUP_SIZE, INT8_GROUP_SIZE

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

        Or float8_e4m3fn or int8 as it is stored, for a parameter that fp8 or int8 `keeps`.
        """
        rows = self._rows.get(piece.parameter)
        if rows is None:  # the router of an upcycled model: as a new one is initialised
            out[...] = _ROUTER_DEVIATION * self._routers.standard_normal(out.size, np.float32)
            return
        for row, start, within in overlaps(piece, rows):
            tensor = self._tensors[row.source]
            if row.interleaved:
                self._read_interleaved(row, tensor, row.start + start, out[within])
            else:
                self._reader.read(tensor, row.start + start, out[within])

    def keeps(self, parameter: str, dtype: str) -> bool:
        """Says whether weights of `dtype` hold all values and scales of a parameter's tensors."""
        rows = self._rows.get(parameter, [])
        return bool(rows) and all(self._tensors[row.source].kept_dtype == dtype for row in rows)

    def stored_scales(self, parameter: str) -> np.ndarray:
        """The scales f32 [*E*O] of a parameter that fp8 or int8 `keeps`.

        Not while another thread fills.
        """
        scales = []
        for row in sorted(self._rows[parameter], key=lambda row: row.index):
            of_rows = self._reader.scales_of_rows(self._tensors[row.source])
            scales.append(self._in_our_order(row, of_rows[:, None]).reshape(-1))
        return np.concatenate(scales)

    def fill_group_values(self, dtype: str, piece: ParameterPiece, out: np.ndarray) -> None:
        """Puts a piece of the values of a parameter that int4 or int8x16 `keeps` into `out`, flat.

        They are u8, with two inputs in a byte, or i8.
        """
        is_int4 = dtype == "int4"

        def read(tensor: Tensor, first: int, rows: np.ndarray) -> None:
            if is_int4:
                runs = self._reader.codes(tensor, first, len(rows), halves=True)
            else:
                runs = self._reader.group_values(tensor, first, len(rows))
            for run in runs:
                rows[: len(run)] = run
                rows = rows[len(run) :]

        self._fill_rows(piece, out, 2 if is_int4 else 1, read)

    def fill_group_scales(self, dtype: str, piece: ParameterPiece, out: np.ndarray) -> None:
        """Puts a piece of the scales of such a parameter, with int4's minima, into `out`: f16."""
        is_int4 = dtype == "int4"

        def read(tensor: Tensor, first: int, rows: np.ndarray) -> None:
            of_groups = self._reader.pairs if is_int4 else self._reader.group_scales
            rows[...] = of_groups(tensor, first, len(rows)).reshape(len(rows), -1)

        parameter = piece.parameter.removesuffix("scale") + "weight"
        width = GROUP_SIZE // 2 if is_int4 else INT8_GROUP_SIZE
        self._fill_rows(replace(piece, parameter=parameter), out, width, read)

    def _fill_rows(
        self,
        piece: ParameterPiece,
        out: np.ndarray,
        inputs: int,
        read: Callable[[Tensor, int, np.ndarray], None],
    ) -> None:
        """Fills a piece each of whose elements stands for so many inputs of a weight.

        `read` is given a tensor, its first row, and the rows of `out` that it fills.
        """
        shape = (*piece.shape[:-1], piece.shape[-1] * inputs)
        weights = replace(piece, shape=shape, start=piece.start * inputs)
        for row, start, within in overlaps(weights, self._rows[piece.parameter]):
            tensor = self._tensors[row.source]
            width = tensor.shape[-1]
            first, position = divmod(row.start + start, width)
            assert not position and not (within.stop - within.start) % width, (piece, row)
            rows = out[within.start // inputs : within.stop // inputs]
            rows = rows.reshape(-1, width // inputs)
            read(tensor, first, rows)
            rows[...] = self._in_our_order(row, rows)

    def _in_our_order(self, row: Row, stored: np.ndarray) -> np.ndarray:
        """Rows [R C] of whole heads, of a tensor in its own rotary order."""
        if not row.interleaved:
            return stored
        columns = stored.shape[1]
        pairs = stored.reshape(-1, self._head_size // 2, 2, columns)
        return pairs.swapaxes(1, 2).reshape(-1, columns)

    def _read_interleaved(self, row: Row, tensor: Tensor, start: int, out: np.ndarray) -> None:
        """Reads whole heads [H D], turning rows 0 1 2 3 4 5 into 0 2 4 1 3 5."""
        head_size, columns = self._head_size, tensor.shape[-1]
        # A piece cuts within a head only if a single head is larger than a piece.
        assert start % (head_size * columns) == 0 and out.size % (head_size * columns) == 0
        stored = np.empty_like(out)
        self._reader.read(tensor, start, stored)
        out.reshape(-1, columns)[...] = self._in_our_order(row, stored.reshape(-1, columns))
