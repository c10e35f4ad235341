"""Tensors in files of any format: where they are, and what their bytes mean. No data is read."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.source import gguf_blocks
from convert.source.words import Layout
from mixtral_jax.weight import GROUP_SIZE

# Encodings that numpy reads without decoding.
FP8 = "F8_E4M3"
INT8 = "I8"
PLAIN: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    FP8: np.dtype(ml_dtypes.float8_e4m3fn),
}
# Those of numbers that are no weights by themselves.
INTEGERS: dict[str, np.dtype[Any]] = {
    INT8: np.dtype(np.int8),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
STORED = PLAIN | INTEGERS


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, row-major."""

    file: Path
    offset: int  # of its first byte
    shape: tuple[int, ...]
    encoding: str  # as safetensors and GGUF name them: F32, BF16, Q4_1
    scale: "Scale | None" = None  # of FP8 and int8: the values are those stored times the scale's
    # For integers in words, whose file and offset are this tensor's.
    packing: "Packing | None" = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file, for an encoding that `is_readable`."""
        if self.packing is not None:
            return self.packing.codes.nbytes
        elements, size = block_of(self)
        return self.size // elements * size

    @property
    def is_readable(self) -> bool:
        """Says whether it can be decoded to floats."""
        has_scales = self.scale is not None or self.packing is not None
        return has_scales or is_readable(self.encoding)

    @property
    def kept_dtype(self) -> str | None:
        """The dtype of ours whose weights hold its values and scales as they are, if there is one.

        fp8 and int8 have a scale for each row [I]; int4 has scales for 32 inputs, int8x16 for 16.
        """
        if (of_blocks := gguf_blocks.kept_dtype(self.encoding)) is not None:
            return of_blocks
        if self.scale is not None and self.scale.block[1] == self.shape[-1]:
            return {FP8: "fp8", INT8: "int8"}[self.encoding]
        return None if self.packing is None else self.packing.kept_dtype(self.shape[-1])


@dataclass(frozen=True)
class Scale:
    """Factors of a matrix [O I], one for each block: [O/rows I/columns]."""

    tensor: Tensor
    block: tuple[int, int]  # rows and columns, of which the last ones may be fewer


@dataclass(frozen=True)
class Packing:
    """Integers that stand for a matrix [O I]: a weight is (code - zero) * scale.

    Scale and zero are those of the group of inputs that it is in; a zero of symmetric integers is
    the middle of their range.
    """

    layout: Layout
    bits: int
    group: int  # inputs of a group, of which the last one may have fewer
    codes: Tensor  # words
    scales: Tensor  # floats
    zeros: Tensor | None  # words; None where integers are symmetric
    zero_offset: int  # what is added to each zero in a stored word
    order: Tensor | None  # the group of each input; None where groups are runs of inputs

    def kept_dtype(self, inputs: int) -> str | None:
        """The same as of `Tensor`, by the number of inputs."""
        if self.order is not None:
            return None
        if self.bits == 8:  # signed, by a scale of the whole row
            return "int8" if self.zeros is None and self.group >= inputs else None
        return None if self.group % GROUP_SIZE else "int4"


def block_of(tensor: Tensor) -> tuple[int, int]:
    """Returns elements and bytes of the smallest unit that can be decoded."""
    if tensor.encoding in STORED:
        return 1, STORED[tensor.encoding].itemsize
    import gguf

    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.encoding]]
    return elements, size


def is_readable(encoding: str) -> bool:
    """Returns true for encodings whose tensors can be decoded without others."""
    if encoding in PLAIN:
        return True
    import gguf

    try:
        kind = gguf.GGMLQuantizationType[encoding]
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (KeyError, NotImplementedError):
        return False
    return True
