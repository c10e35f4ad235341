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
PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
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

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file, for an encoding that `is_readable`."""
        elements, size = _block(self)
        return self.size // elements * size


class Reader:
    """Reads runs of elements; a context manager that closes its files. For one thread at a time.

    Args:
        decoded_at_a_time: elements that are decoded by one call of numpy or gguf, at least a row.
    """

    def __init__(self, decoded_at_a_time: int = DECODED_AT_A_TIME) -> None:
        self._files: dict[Path, FileIO] = {}
        self._decoded_at_a_time = decoded_at_a_time
        self._scratch = np.empty(decoded_at_a_time * 4, np.uint8)

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
                nearest. It holds whole rows where the tensor is quantised.

        Raises ConversionError if the file ends early.
        """
        plain = PLAIN.get(tensor.encoding)
        if plain == out.dtype:
            self._fill(tensor, start * plain.itemsize, out.view(np.uint8))
            return
        elements, size = _block(tensor)
        row = 1 if plain else tensor.shape[-1]
        assert start % row == 0 and out.size % row == 0, (tensor, start, out.size)
        step = max(1, self._decoded_at_a_time // row) * row
        for begin in range(0, out.size, step):
            values = out[begin : begin + step]
            raw = self._raw(values.size // elements * size)
            self._fill(tensor, (start + begin) // elements * size, raw)
            values[...] = raw.view(plain) if plain else _dequantised(raw, tensor)

    def read_bytes(self, tensor: Tensor, start: int, out: np.ndarray) -> None:
        """Fills `out`, of uint8, with the stored bytes of the tensor from byte `start` on."""
        self._fill(tensor, start, out)

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
