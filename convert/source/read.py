"""Tensors in files of any format: where they are, and reading a run of their elements.

Files are read with plain reads into buffers that the caller keeps. Mapping them into memory would
count every page that was touched as ours, and new memory for each piece costs as much time as the
reading itself.
"""

import math
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

import ml_dtypes
import numpy as np

from convert.errors import ConversionError

# Encodings that numpy reads without decoding.
FP8 = "F8_E4M3"
PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    FP8: np.dtype(ml_dtypes.float8_e4m3fn),
}
# Elements decoded at a time: small enough to stay in a processor's cache.
DECODED_AT_A_TIME = 1 << 18


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, row-major."""

    file: Path
    offset: int  # of its first byte
    shape: tuple[int, ...]
    encoding: str  # as safetensors and GGUF name them: F32, BF16, Q4_1
    scale: "Scale | None" = None  # of FP8: the values are those stored times the scale's

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file, for an encoding that `is_readable`."""
        elements, size = _block(self)
        return self.size // elements * size

    @property
    def has_scales_of_rows(self) -> bool:
        """Says whether it is FP8 whose every row [I] has one scale."""
        return self.scale is not None and self.scale.block[1] == self.shape[-1]


@dataclass(frozen=True)
class Scale:
    """Factors of a matrix [O I], one for each block: [O/rows I/columns]."""

    tensor: Tensor
    block: tuple[int, int]  # rows and columns, of which the last ones may be fewer


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
                nearest. It holds whole rows where the tensor is quantised. Of float8_e4m3fn, for
                such a tensor: the values as they are stored, without their scales.

        Raises ConversionError if the file ends early, or a scale is not finite.
        """
        plain = PLAIN.get(tensor.encoding)
        if plain == out.dtype:
            self._fill(tensor, start * plain.itemsize, out.view(np.uint8))
            return
        elements, size = _block(tensor)
        row = 1 if plain and tensor.scale is None else tensor.shape[-1]
        assert start % row == 0 and out.size % row == 0, (tensor, start, out.size)
        step = max(1, self._decoded_at_a_time // row) * row
        for begin in range(0, out.size, step):
            values = out[begin : begin + step]
            raw = self._raw(values.size // elements * size)
            self._fill(tensor, (start + begin) // elements * size, raw)
            if tensor.scale is not None:
                rows = raw.view(PLAIN[FP8]).astype(np.float32).reshape(-1, row)
                rows *= self._factors(tensor.scale, (start + begin) // row, *rows.shape)
                values[...] = rows.reshape(-1)
            else:
                values[...] = raw.view(plain) if plain else _dequantised(raw, tensor)

    def read_bytes(self, tensor: Tensor, start: int, out: np.ndarray) -> None:
        """Fills `out`, of uint8, with the stored bytes of the tensor from byte `start` on."""
        self._fill(tensor, start, out)

    def scales_of_rows(self, tensor: Tensor) -> np.ndarray:
        """Reads the scale of each row of an FP8 tensor that `has_scales_of_rows`: f32 [O]."""
        assert tensor.scale is not None and tensor.has_scales_of_rows, tensor
        return self._factors(tensor.scale, 0, tensor.shape[0], 1).reshape(-1)

    def _factors(self, scale: Scale, first: int, rows: int, columns: int) -> np.ndarray:
        """The factors of `rows` rows from `first` on: [rows, columns], or [rows 1] if equal."""
        if self._last_scale is None or self._last_scale[0] != scale:
            stored = np.empty(scale.tensor.size, np.float32)
            self.read(scale.tensor, 0, stored)
            if not np.isfinite(stored).all():
                raise ConversionError([f"{scale.tensor.file} has a scale that is not finite"])
            self._last_scale = (scale, stored.reshape(scale.tensor.shape))
        factors = self._last_scale[1][np.arange(first, first + rows) // scale.block[0]]
        if factors.shape[1] == 1:
            return factors
        return np.repeat(factors, scale.block[1], axis=1)[:, :columns]

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


def _block(tensor: Tensor) -> tuple[int, int]:
    """Returns elements and bytes of the smallest unit that can be decoded."""
    if tensor.encoding in PLAIN:
        return 1, PLAIN[tensor.encoding].itemsize
    import gguf

    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.encoding]]
    return elements, size


def is_readable(encoding: str) -> bool:
    """Returns true for encodings whose tensors can be decoded."""
    if encoding in PLAIN:
        return True
    import gguf

    try:
        kind = gguf.GGMLQuantizationType[encoding]
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (KeyError, NotImplementedError):
        return False
    return True


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

    elements, size = _block(tensor)
    rows = raw.reshape(-1, tensor.shape[-1] // elements * size)
    values: np.ndarray = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[tensor.encoding])
    return values.reshape(-1)
