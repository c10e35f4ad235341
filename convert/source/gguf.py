"""The header of a GGUF file: metadata, and where its tensors are.

The gguf package reads headers too, but value by value through a memory map: a vocabulary takes it
many seconds, this a fraction of one. Decoding stays with the package (see read.py).

    magic, version, number of tensors, number of metadata values
    metadata     name, type, value; a string is its length and UTF-8, an array its type and length
    tensors      name, sizes with the innermost first, encoding, offset of the data
    padding to `general.alignment`, then the data

Numbers are little-endian. (github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3)
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConversionError
from convert.source.tensor import Tensor

_VERSIONS = (2, 3)
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


def gguf_header(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file's tensors by name, and its metadata as numbers, bools, strings, lists of them.

    Tensors of a type that the gguf package does not know are let through, as of the encoding
    "GGML type 31", for the tensor may not be needed.

    Raises ConversionError for a file that is no GGUF file of version 2 or 3, or that is not whole.
    """
    length = path.stat().st_size
    if not length:
        raise ConversionError([f"{path} is empty; fetch it again"])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ConversionError([f"{path} is not a GGUF file"])
        try:
            tensors, metadata = _Cursor(data).header(path)
        except (struct.error, ValueError, KeyError, IndexError) as error:
            raise ConversionError(
                [f"{path}: its header is malformed or cut short: {error}"]
            ) from error
    for name, (_, end) in tensors.items():
        if end > length:
            raise ConversionError([f"{path} ends within tensor {name}; fetch it again"])
    return {name: tensor for name, (tensor, _) in tensors.items()}, metadata


class _Cursor:
    """A position in a header, which moves on with everything that is read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 4

    def header(self, path: Path) -> tuple[dict[str, tuple[Tensor, int]], dict[str, Any]]:
        """Reads all tensors, each with the offset of its end, and all metadata."""
        (version,) = self.unpack("<I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}; only versions 2 and 3 in little-endian are read")
        num_tensors, num_values = self.unpack("<QQ")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            name = self.string()
            if name in metadata:
                raise ValueError(f"{name} is there twice")
            metadata[name] = self.value(self.unpack("<I")[0])
        entries = [self.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r} where a power of two is needed")
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, tuple[Tensor, int]] = {}
        for name, shape, encoding, offset, nbytes in entries:
            if name in tensors:
                raise ValueError(f"tensor {name} is there twice")
            tensor = Tensor(path, start + offset, shape, encoding)
            tensors[name] = (tensor, tensor.offset + nbytes)
        return tensors, metadata

    def tensor(self) -> tuple[str, tuple[int, ...], str, int, int]:
        """Reads a tensor's name, shape (outermost size first), encoding, offset and bytes.

        The bytes of a type that is not known count as 0.
        """
        import gguf

        name = self.string()
        (dimensions,) = self.unpack("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        sizes = self.unpack(f"<{dimensions}Q")
        number, offset = self.unpack("<IQ")
        shape = tuple(reversed(sizes))
        try:
            kind = gguf.GGMLQuantizationType(number)
            elements, size = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            return name, shape, f"GGML type {number}", offset, 0
        if sizes and sizes[0] % elements:
            raise ValueError(f"tensor {name} has rows that {kind.name} cannot hold")
        return name, shape, kind.name, offset, math.prod(sizes) * size // elements

    def unpack(self, form: str) -> tuple[Any, ...]:
        """Reads numbers by a format of `struct`."""
        values = struct.unpack_from(form, self.data, self.position)
        self.position += struct.calcsize(form)
        return values

    def string(self) -> str:
        """Reads a length and so many bytes of UTF-8."""
        (length,) = self.unpack("<Q")
        return self.take(length).decode("utf-8")

    def take(self, length: int) -> bytes:
        """Reads so many bytes."""
        if length > len(self.data) - self.position:
            raise ValueError("a length reaches beyond the end of the file")
        self.position += length
        return self.data[self.position - length : self.position]

    def value(self, kind: int) -> Any:
        """Reads a metadata value of a type, by the type's number."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.numbers(kind, 1)[0]
        kind, count = self.unpack("<IQ")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        return self.numbers(kind, count)

    def numbers(self, kind: int, count: int) -> list[Any]:
        """Reads so many numbers, or bools, of a type."""
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise ValueError(f"{kind} is no type of metadata that is known")
        numbers: list[Any] = np.frombuffer(self.take(dtype.itemsize * count), dtype).tolist()
        return numbers
