"""fp8: weights as float8_e4m3fn with one scale for each output, kept as they are or rounded.

What a source stores so is copied bit by bit, a scale of a whole tensor being repeated for every
output. All else is rounded, each output by its own largest value: float weights, and FP8 with
scales of blocks, which are rounded a second time then. Nothing needs to be calibrated: fp8 has as
many steps for small values as for large ones, so outliers take none from the others. Embedding,
head, norms and routers stay floats.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.assemble import Assembly
from convert.name_table import NameTable
from convert.pieces import ParameterPiece, filled, pieces
from convert.progress import Progress
from convert.source.read import FP8, Tensor
from mixtral_jax.checkpoint.parameters import stored_bytes
from mixtral_jax.checkpoint.writer import ParameterWriter
from mixtral_jax.weight import QUANTIZED, Weight

logger = logging.getLogger(__name__)

_STORED = np.dtype(QUANTIZED["fp8"])


def fp8_shapes(
    shapes: Mapping[str, jax.ShapeDtypeStruct], dtype: str
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of an fp8 model with its embedding, head, norms and routers in `dtype`."""
    return {
        name: array
        if array.dtype == _STORED or name.endswith(".scale")
        else jax.ShapeDtypeStruct(array.shape, jnp.dtype(dtype))
        for name, array in shapes.items()
    }


def keeps_fp8(
    table: NameTable, tensors: Mapping[str, Tensor], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> bool:
    """Says whether all weights that an fp8 model of these shapes rounds can be kept as they are."""
    rounded = [name for name, array in shapes.items() if array.dtype == _STORED]
    sources = {row.source for name in rounded for row in table.by_parameter[name]}
    held = [tensors[name] for name in sources if name in tensors]
    return bool(held) and all(tensor.has_scales_of_rows for tensor in held)


def holds_fp8(tensors: Iterable[Tensor]) -> bool:
    """Says whether any tensor is FP8."""
    return any(tensor.encoding == FP8 for tensor in tensors)


@dataclass
class Lost:
    """The change that rounding makes to the weights that are not kept: sums of squares."""

    parameters: int = 0
    weights: float = 0.0
    changes: float = 0.0

    @property
    def error(self) -> float:
        """The root of the changes' squares beside that of the weights'."""
        return math.sqrt(self.changes / self.weights) if self.weights else 0.0


def write_fp8(assembly: Assembly, writer: ParameterWriter, progress: Progress) -> Lost:
    """Writes all parameters of an fp8 checkpoint.

    Args:
        assembly: fills pieces of parameters.
        writer: of parameters of the shapes that `fp8_shapes` gives.
        progress: called with bytes written and bytes in all.

    Returns what rounding changed. Two pieces and one parameter's scales are in memory at a time.
    """
    output = _Output(assembly, writer, progress)
    for name, array in writer.shapes.items():
        if name.endswith(".scale"):
            continue  # written with its weight
        cut = list(pieces({name: array}, writer.chunk_bytes))
        if array.dtype != _STORED:
            output.copy(cut, np.dtype(array.dtype))
        elif (scales := assembly.stored_scales(name)) is not None:
            output.copy(cut, _STORED)
            output.put_scales(name, scales)
        else:
            output.round(name, cut)
    return output.lost


class _Output:
    """Writes parameters piece by piece, while another thread reads the next one, and counts."""

    def __init__(self, assembly: Assembly, writer: ParameterWriter, progress: Progress) -> None:
        self.lost = Lost()
        self._assembly = assembly
        self._writer = writer
        self._progress = progress
        self._rounded = jax.jit(_round)
        self._done, self._total = 0, stored_bytes(writer.shapes)
        progress(self._done, self._total)

    def copy(self, cut: list[ParameterPiece], dtype: np.dtype) -> None:
        """Writes pieces as the assembly fills them."""
        for piece, values in filled(cut, dtype, self._assembly.fill):
            self._put(piece.parameter, piece.index, values.reshape(piece.shape))

    def round(self, name: str, cut: list[ParameterPiece]) -> None:
        """Writes a weight's pieces rounded, and the scales of its outputs."""
        outputs = math.prod(self._writer.shapes[_scale_name(name)].shape)
        num_inputs = math.prod(self._writer.shapes[name].shape) // outputs
        scales = np.empty(outputs, np.float32)
        for piece, values in filled(cut, np.dtype(np.float32), self._assembly.fill):
            rows = values.reshape(-1, num_inputs)
            weight, size, change = self._rounded(rows)
            rounded, scale = np.asarray(weight.values), np.asarray(weight.scale)
            first = piece.start // num_inputs
            scales[first : first + scale.size] = scale
            self._put(name, piece.index, rounded.reshape(piece.shape))
            self.lost.weights += float(size)
            self.lost.changes += float(change)
        self.lost.parameters += 1
        self.put_scales(name, scales)

    def put_scales(self, name: str, scales: np.ndarray) -> None:
        """Writes the scales of a weight's outputs, which are flat."""
        scale_name = _scale_name(name)
        self._put(scale_name, ..., scales.reshape(self._writer.shapes[scale_name].shape))

    def _put(self, name: str, index: Any, values: np.ndarray) -> None:
        self._writer.write(name, index, values)
        self._done += values.nbytes
        self._progress(self._done, self._total)


def _round(rows: jax.Array) -> tuple[Weight, jax.Array, jax.Array]:
    """Rows [R I] rounded, and the sums of squares of the rows and of what rounding changes."""
    weight = Weight.quantized(rows, "fp8")
    assert weight.scale is not None
    change = rows - weight.values.astype(jnp.float32) * weight.scale[:, None]
    return weight, jnp.sum(jnp.square(rows)), jnp.sum(jnp.square(change))


def _scale_name(name: str) -> str:
    return name.removesuffix("weight") + "scale"
