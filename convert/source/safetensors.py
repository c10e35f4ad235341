"""Tensors in files: where they are, and reading a run of their elements.

Files are read with plain reads into buffers that the caller keeps. Mapping them into memory would
count every page that was touched as ours, and new memory for each piece costs as much time as the
reading itself.

A safetensors file is eight bytes of length, a JSON header, then the data; what a file can get
wrong is checked here, where it can be named, and without the data being read.
(huggingface.co/docs/safetensors, "Format")
"""

import json
import math
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np

from convert.errors import ConversionError

# Encodings that are arrays as they stand.
PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# A header is a few hundred kilobytes; a longer one is no safetensors file.
_LONGEST_HEADER = 100 << 20
# Elements decoded at a time: small enough to stay in a processor's cache.
_STEP = 1 << 18


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, row-major."""

    file: Path
    offset: int  # of its first byte
    shape: tuple[int, ...]
    encoding: str  # as safetensors and GGUF name them: F32, BF16, Q4_1

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, for an encoding that `is_readable`."""
        elements, size = _block(self)
        return self.size // elements * size


class Reader:
    """Reads runs of elements; a context manager that closes its files. For one thread at a time."""

    def __init__(self) -> None:
        self._files: dict[Path, FileIO] = {}
        self._scratch = np.empty(_STEP * 4, np.uint8)

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
        step = max(1, _STEP // row) * row
        for begin in range(0, out.size, step):
            part = out[begin : begin + step]
            raw = self._raw(part.size // elements * size)
            self._fill(tensor, (start + begin) // elements * size, raw)
            part[...] = raw.view(plain) if plain else _dequantised(raw, tensor)

    def _raw(self, nbytes: int) -> np.ndarray:
        if nbytes > self._scratch.size:
            self._scratch = np.empty(nbytes, np.uint8)
        return self._scratch[:nbytes]

    def _fill(self, tensor: Tensor, offset: int, out: np.ndarray) -> None:
        """Fills bytes from `offset` within the tensor."""
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
    """Elements and bytes of the smallest unit that can be decoded."""
    if tensor.encoding in PLAIN:
        return 1, PLAIN[tensor.encoding].itemsize
    import gguf

    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.encoding]]
    return elements, size


def is_readable(encoding: str) -> bool:
    """Whether tensors in this encoding can be decoded."""
    if encoding in PLAIN:
        return True
    import gguf

    try:
        kind = gguf.GGMLQuantizationType[encoding]
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (KeyError, NotImplementedError):
        return False
    return True


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are stored with the same bytes."""
    if one.shape != other.shape or one.encoding != other.encoding or not is_readable(one.encoding):
        return False
    parts = np.empty((2, 1 << 20), np.uint8)
    with Reader() as reader:
        for start in range(0, one.nbytes, parts.shape[1]):
            count = min(parts.shape[1], one.nbytes - start)
            for tensor, part in zip((one, other), parts, strict=True):
                reader._fill(tensor, start, part[:count])
            if not np.array_equal(parts[0, :count], parts[1, :count]):
                return False
    return True


def _dequantised(raw: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Whole rows of a quantised GGUF tensor as flat f32."""
    import gguf

    elements, size = _block(tensor)
    rows = raw.reshape(-1, tensor.shape[-1] // elements * size)
    values: np.ndarray = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[tensor.encoding])
    return values.reshape(-1)


def safetensors_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Encodings that cannot be read are let through, for the tensor may not be needed. Raises
    ConversionError for a file that is not whole, or whose tensors overlap or leave gaps.
    """
    length = path.stat().st_size
    with FileIO(path) as file:
        count = int.from_bytes(file.read(8), "little")
        if length < 8 or count > min(length - 8, _LONGEST_HEADER):
            raise ConversionError([f"{path} is not a safetensors file, or was cut short"])
        text = file.read(count)
    try:
        entries = json.loads(text, object_pairs_hook=_without_duplicates)
        del text
        entries.pop("__metadata__", None)
        found = {name: _entry(path, 8 + count, entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConversionError([f"{path}: its header is malformed: {error}"]) from error
    end = _check_layout(path, 8 + count, found)
    if end != length:
        remedy = "it was cut short; fetch it again" if end > length else "its end is not accounted"
        raise ConversionError(
            [f"{path} has {length} bytes where its header promises {end}: {remedy}"]
        )
    return {name: tensor for name, (tensor, _) in found.items()}


def _entry(path: Path, data: int, entry: Any) -> tuple[Tensor, int]:
    """A tensor and the offset of its end; raises what json content can make it raise."""
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    numbers = (begin, end, *shape)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{entry} has a number that is no offset or size")
    return Tensor(path, data + begin, shape, str(entry["dtype"])), data + end


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{', '.join(twice)} is there twice")
    return content


def _check_layout(path: Path, data: int, found: dict[str, tuple[Tensor, int]]) -> int:
    """Tensors must follow one another without a gap. Returns where the last one ends."""
    position = data
    for name, (tensor, end) in sorted(found.items(), key=lambda item: item[1][0].offset):
        if tensor.offset != position or end < position:
            raise ConversionError(
                [f"{path}: tensor {name} overlaps another one, or there is a gap before it"]
            )
        if tensor.encoding in PLAIN and end - position != tensor.nbytes:
            raise ConversionError(
                [
                    f"{path}: tensor {name} of shape {list(tensor.shape)} in {tensor.encoding} "
                    f"has {end - position} bytes instead of {tensor.nbytes}"
                ]
            )
        position = end
    return position
