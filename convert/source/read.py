"""Reading runs of elements of tensors in files of any format.

Files are read with plain reads into buffers that the caller keeps. Mapping them into memory would
count every page that was touched as ours, and new memory for each piece costs as much time as the
reading itself.
"""

from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from convert.errors import ConversionError
from convert.source import gguf_blocks
from convert.source.tensor import (
    INT8,
    INTEGERS,
    STORED,
    Packing,
    Scale,
    Tensor,
    block_of,
    is_readable,
)
from convert.source.words import in_each_field
from mixtral_jax.weight import GROUP_SIZE

# Elements decoded at a time: small enough to stay in a processor's cache.
DECODED_AT_A_TIME = 1 << 18


class Grids(NamedTuple):
    """Scale and zero of each group of a packed matrix: f32 [O G] and i16 [O G]."""

    scale: np.ndarray
    zero: np.ndarray


class Reader:
    """Reads runs of elements; a context manager that closes its files. For one thread at a time.

    Args:
        decoded_at_a_time: elements that are decoded by one call of numpy or gguf, at least a row.
    """

    def __init__(self, decoded_at_a_time: int = DECODED_AT_A_TIME) -> None:
        self._files: dict[Path, FileIO] = {}
        self._decoded_at_a_time = decoded_at_a_time
        self._scratch = np.empty(decoded_at_a_time * 4, np.uint8)
        self._last_scale: tuple[Scale, np.ndarray] | None = None
        self._last_grids: tuple[Packing, Grids] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, tensor: Tensor, start: int, out: np.ndarray) -> None:
        """Fills `out` with the elements of the flattened tensor from `start` on.

        Args:
            tensor: what to read from.
            start: first element; the beginning of a row where the tensor is quantised.
            out: one-dimensional and contiguous, f32 or bf16; f32 is exact, bf16 rounds to
                nearest. It holds whole rows where the tensor is quantised. Or float8_e4m3fn or
                int8, for such a tensor: the values as they are stored, without their scales.

        Raises ConversionError if the file ends early, or a scale is not finite.
        """
        if tensor.packing is not None:
            self._read_packed(tensor, tensor.packing, start, out)
            return
        plain = STORED.get(tensor.encoding)
        if plain == out.dtype:
            self._fill(tensor, start * plain.itemsize, out.view(np.uint8))
            return
        elements, size = block_of(tensor)
        row = 1 if plain and tensor.scale is None else tensor.shape[-1]
        assert start % row == 0 and out.size % row == 0, (tensor, start, out.size)
        step = max(1, self._decoded_at_a_time // row) * row
        for begin in range(0, out.size, step):
            values = out[begin : begin + step]
            raw = self._raw(values.size // elements * size)
            self._fill(tensor, (start + begin) // elements * size, raw)
            if tensor.scale is not None:
                assert plain is not None
                rows = raw.view(plain).astype(np.float32).reshape(-1, row)
                rows *= self._factors(tensor.scale, (start + begin) // row, *rows.shape)
                values[...] = rows.reshape(-1)
            else:
                values[...] = raw.view(plain) if plain else _dequantised(raw, tensor)

    def read_bytes(self, tensor: Tensor, start: int, out: np.ndarray) -> None:
        """Fills `out`, of uint8, with the stored bytes of the tensor from byte `start` on."""
        self._fill(tensor, start, out)

    def scales_of_rows(self, tensor: Tensor) -> np.ndarray:
        """Reads the scale of each row of a tensor that fp8 or int8 keeps: f32 [O]."""
        if tensor.packing is not None:
            return self.grids(tensor).scale.reshape(-1)
        assert tensor.scale is not None and tensor.kept_dtype, tensor
        return self._factors(tensor.scale, 0, tensor.shape[0], 1).reshape(-1)

    def integers(self, tensor: Tensor, name: str) -> np.ndarray:
        """Reads a whole tensor of I32 or I64, which has to be small; `name` is for errors."""
        dtype = INTEGERS.get(tensor.encoding)
        if dtype is None:
            raise ConversionError(
                [f"tensor {name} is stored as {tensor.encoding} and not as integers"]
            )
        values = np.empty(tensor.size, dtype)
        self._fill(tensor, 0, values.view(np.uint8))
        return values.reshape(tensor.shape)

    def codes(
        self, tensor: Tensor, first: int, count: int, *, halves: bool = False
    ) -> Iterator[np.ndarray]:
        """Yields the integers of rows of a packed matrix, some rows at a time: u8 [_ I].

        Or [_ I/2] with two integers of four bits in a byte, that of the even input in its low half;
        so for GGUF's blocks.
        """
        packing = tensor.packing
        if packing is None:
            assert halves, tensor
            for raw in self._blocks(tensor, first, count):
                yield gguf_blocks.halves(raw, tensor.encoding)
            return
        layout, bits = packing.layout, packing.bits
        begin, end = layout.words_along_outputs(first, first + count, bits)
        words = self._words(packing.codes, begin, end, columns=layout.inputs_first)
        step = max(1, self._decoded_at_a_time // tensor.shape[1])
        for start in range(first, first + count, step):
            stop = min(start + step, first + count)
            low, high = layout.words_along_outputs(start, stop, bits)
            run = slice(low - begin, high - begin)
            block = words[:, run] if layout.inputs_first else words[run]
            codes = layout.halves(block) if halves else layout.codes(block, bits)
            skipped = start - layout.outputs_of_word(low, bits)
            yield codes[skipped : skipped + stop - start]

    def grids(self, tensor: Tensor) -> Grids:
        """Reads the scales and zeros of all rows of a packed matrix."""
        packing = tensor.packing
        assert packing is not None
        if self._last_grids is None or self._last_grids[0] != packing:
            scale = self._floats(packing.scales)
            if packing.layout.inputs_first:
                scale = np.ascontiguousarray(scale.T)
            if packing.zeros is None:
                zero = np.full(scale.shape, 1 << (packing.bits - 1), np.int16)
            else:
                words = self._words(packing.zeros, 0, packing.zeros.shape[0], columns=False)
                # Added to words and not to the zeros: see packed.py.
                offset = in_each_field(packing.zero_offset, packing.bits)
                words = words.view("<u4") + np.uint32(offset)
                stored = packing.layout.zeros(words, tensor.shape[0], packing.bits)
                zero = stored.astype(np.int16)
            self._last_grids = (packing, Grids(scale, np.ascontiguousarray(zero)))
        return self._last_grids[1]

    def pairs(self, tensor: Tensor, first: int, count: int) -> np.ndarray:
        """Scale and minimum of 32 inputs of rows of a matrix that int4 keeps: f16 [R I/32 2].

        Scales are rounded to float16 if they are something else, and so is a minimum, the product
        of zero and scale.
        """
        packing = tensor.packing
        assert tensor.kept_dtype == "int4", tensor
        if packing is None:
            runs = self._blocks(tensor, first, count)
            return np.concatenate([gguf_blocks.pairs(raw, tensor.encoding) for raw in runs])
        grids = self.grids(tensor)
        groups = np.arange(tensor.shape[1] // GROUP_SIZE) * GROUP_SIZE // packing.group
        rows = slice(first, first + count)
        with np.errstate(over="ignore"):  # the writer refuses what is not finite
            scale = grids.scale[rows].astype(np.float16)
            minimum = (-grids.zero[rows] * scale.astype(np.float32)).astype(np.float16)
        return np.stack([scale[:, groups], minimum[:, groups]], axis=-1)

    def group_values(self, tensor: Tensor, first: int, count: int) -> Iterator[np.ndarray]:
        """Yields the integers of rows of a matrix that int8x16 keeps, some at a time: i8 [_ I]."""
        for raw in self._blocks(tensor, first, count):
            yield gguf_blocks.values(raw, tensor.encoding)

    def group_scales(self, tensor: Tensor, first: int, count: int) -> np.ndarray:
        """The scales of 16 inputs of rows of such a matrix: f16 [R I/16]."""
        runs = self._blocks(tensor, first, count)
        return np.concatenate([gguf_blocks.scales(raw, tensor.encoding) for raw in runs])

    def _read_packed(self, tensor: Tensor, packing: Packing, start: int, out: np.ndarray) -> None:
        inputs = tensor.shape[1]
        is_kept = out.dtype == INTEGERS[INT8]
        assert start % inputs == 0 and out.size % inputs == 0, (tensor, start, out.size)
        grids = self.grids(tensor)
        first, rows = start // inputs, out.reshape(-1, inputs)
        is_regular = packing.order is None and inputs % packing.group == 0
        if packing.order is not None:
            groups = self.integers(packing.order, "of groups")
        else:
            groups = np.arange(inputs) // packing.group
        done = 0
        for codes in self.codes(tensor, first, len(rows)):
            own = slice(first + done, first + done + len(codes))
            scale, zero = grids.scale[own], grids.zero[own]
            if is_regular:  # broadcasting takes a tenth of the time of looking up
                codes = codes.reshape(*zero.shape, packing.group)
                scale, zero = scale[..., None], zero[..., None]
            else:
                scale, zero = scale[:, groups], zero[:, groups]
            values = codes - zero if is_kept else (codes - zero) * scale
            rows[done : done + len(values)] = values.reshape(-1, inputs)
            done += len(values)

    def _blocks(self, tensor: Tensor, first: int, count: int) -> Iterator[np.ndarray]:
        """Yields the blocks of rows of a matrix of GGUF's, some rows at a time: u8 [_ B].

        The array is valid until the next one is asked for.
        """
        inputs = tensor.shape[-1]
        elements, size = block_of(tensor)
        row_bytes = inputs // elements * size
        step = max(1, self._decoded_at_a_time // inputs)
        for start in range(first, first + count, step):
            rows = min(step, first + count - start)
            raw = self._raw(rows * row_bytes)
            self._fill(tensor, start * row_bytes, raw)
            yield raw.reshape(rows, row_bytes)

    def _words(self, tensor: Tensor, begin: int, end: int, *, columns: bool) -> np.ndarray:
        """Reads rows of a matrix of words, or columns."""
        rows, width = tensor.shape
        if not columns:
            words = np.empty((end - begin, width), INTEGERS["I32"])
            self._fill(tensor, begin * width * words.itemsize, words.reshape(-1).view(np.uint8))
            return words
        words = np.empty((rows, end - begin), INTEGERS["I32"])
        if end - begin == width:
            self._fill(tensor, 0, words.reshape(-1).view(np.uint8))
            return words
        for row in range(rows):
            offset = (row * width + begin) * words.itemsize
            self._fill(tensor, offset, words[row].view(np.uint8))
        return words

    def _factors(self, scale: Scale, first: int, rows: int, columns: int) -> np.ndarray:
        """The factors of `rows` rows from `first` on: [rows, columns], or [rows 1] if equal."""
        if self._last_scale is None or self._last_scale[0] != scale:
            self._last_scale = (scale, self._floats(scale.tensor))
        factors = self._last_scale[1][np.arange(first, first + rows) // scale.block[0]]
        if factors.shape[1] == 1:
            return factors
        return np.repeat(factors, scale.block[1], axis=1)[:, :columns]

    def _floats(self, scales: Tensor) -> np.ndarray:
        """Reads all scales of a tensor in f32; raises ConversionError if some is not finite."""
        stored = np.empty(scales.size, np.float32)
        self.read(scales, 0, stored)
        if not np.isfinite(stored).all():
            raise ConversionError([f"{scales.file} has a scale that is not finite"])
        return stored.reshape(scales.shape)

    def _raw(self, nbytes: int) -> np.ndarray:
        if nbytes > self._scratch.size:
            self._scratch = np.empty(nbytes, np.uint8)
        return self._scratch[:nbytes]

    def _fill(self, tensor: Tensor, offset: int, out: np.ndarray) -> None:
        """Fills `out` with the bytes from `offset` within the tensor on."""
        file = self._files.get(tensor.file)
        if file is None:
            file = self._files[tensor.file] = FileIO(tensor.file)
        file.seek(tensor.offset + offset)
        rest = out.data
        while rest:
            count = file.readinto(rest)
            if not count:
                raise ConversionError([f"{tensor.file} became shorter while it was read"])
            rest = rest[count:]


def is_same(first: Tensor, second: Tensor) -> bool:
    """Returns true if two tensors are stored with the same bytes."""
    if first.shape != second.shape or first.encoding != second.encoding:
        return False
    if not is_readable(first.encoding):
        return False
    blocks = np.empty((2, 1 << 20), np.uint8)
    with Reader() as reader:
        for start in range(0, first.nbytes, blocks.shape[1]):
            count = min(blocks.shape[1], first.nbytes - start)
            for tensor, block in zip((first, second), blocks, strict=True):
                reader.read_bytes(tensor, start, block[:count])
            if not np.array_equal(blocks[0, :count], blocks[1, :count]):
                return False
    return True


def _dequantised(raw: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Decodes whole rows of a quantised GGUF tensor as flat f32."""
    import gguf

    elements, size = block_of(tensor)
    rows = raw.reshape(-1, tensor.shape[-1] // elements * size)
    values: np.ndarray = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[tensor.encoding])
    return values.reshape(-1)
