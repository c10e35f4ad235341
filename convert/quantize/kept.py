"""Rounded weights kept as a source has them: fp8, int8 and int4, whichever it is.

    fp8    float8_e4m3fn with a scale for each output or for the whole tensor
    int8   the same of integers
    int4   integers of four bits in groups of 32 inputs or a multiple, with a scale and a zero each;
           a group of 128 becomes four with equal scales. Or GGUF's Q4_0, Q4_1 and Q4_K, beside
           which weights of other types are int8x16, and Q8_0 and Q6_K are kept as that. Where
           int8 is asked for and most of a GGUF file is Q8_0 or Q6_K, all layers are int8x16

Values are copied bit by bit, and so are scales, but those of int4 that are not float16, and its
minima (zero times scale), which are rounded to float16. All else that a model of the dtype rounds
is rounded plainly: each output, or each group of int4, by its own values. Nothing needs a text.
Embedding and head of int8 and int4 are int8, those of fp8 floats; norms and routers are floats.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.assemble import Assembly
from convert.errors import ConversionError
from convert.name_table import NameTable
from convert.pieces import Fill, filled, pieces
from convert.progress import Progress
from convert.source.tensor import Tensor
from mixtral_jax.checkpoint.parameters import stored_bytes
from mixtral_jax.checkpoint.writer import ParameterWriter
from mixtral_jax.placement import LAYER_WEIGHTS
from mixtral_jax.weight import GROUP_SIZE, GROUPS, INT8_GROUPS, QUANTIZED, Weight

_ROUNDED_AT_A_TIME = 1 << 23  # weights, of which a grid's search takes several copies
_DTYPES = {np.dtype(stored): name for name, stored in QUANTIZED.items()}
# The form that a source has to have for a weight to be kept.
FORMS = {
    "fp8": "FP8 with a scale for each output or tensor",
    "int8": "integers of 8 bits with a scale for each output or tensor",
    "int4": "integers of 4 bits in groups of 32 consecutive inputs or a multiple",
}

GGUF_FORMS = {
    "int4": "GGUF's Q4_0, Q4_1, Q4_K, Q6_K or Q8_0",
    "int8": "GGUF's Q6_K or Q8_0",
}


def fp8_shapes(
    shapes: Mapping[str, jax.ShapeDtypeStruct], dtype: str
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of an fp8 model with its embedding, head, norms and routers in `dtype`."""
    return {
        name: array
        if array.dtype == QUANTIZED["fp8"] or name.endswith(".scale")
        else jax.ShapeDtypeStruct(array.shape, jnp.dtype(dtype))
        for name, array in shapes.items()
    }


def is_rounded(tensor: Tensor) -> bool:
    """Says whether a tensor holds values with scales of their own."""
    return tensor.scale is not None or tensor.packing is not None


def rounded_tensors(table: NameTable, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors of a model's layers that hold values with scales."""
    names = {row.source for row in table.rows if row.parameter.startswith("layers.")}
    return [tensors[name] for name in names if name in tensors and is_rounded(tensors[name])]


def keeps_all(
    table: NameTable,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    dtype: str,
) -> bool:
    """Says whether all layers' weights that a model of these shapes rounds can be kept."""
    names = [name for name, array in shapes.items() if array.dtype == QUANTIZED[dtype]]
    sources = {
        row.source
        for name in names
        if name.startswith("layers.")
        for row in table.by_parameter[name]
    }
    held = [tensors[name] for name in sources if name in tensors]
    return bool(held) and all(tensor.kept_dtype == dtype for tensor in held)


def keeps_most(table: NameTable, tensors: Mapping[str, Tensor], dtype: str) -> bool:
    """Says whether most numbers of the layers' weights are in a form that a dtype keeps."""
    names = {row.source for row in table.rows if _is_weight(row.parameter)} & tensors.keys()
    kept = sum(tensors[name].size for name in names if tensors[name].kept_dtype == dtype)
    return 2 * kept > sum(tensors[name].size for name in names)


def weights_beside(
    table: NameTable, tensors: Mapping[str, Tensor], dtype: str
) -> Iterator[tuple[str, str]]:
    """Yields the names of the layers' weights that int4 or int8 does not keep, with int8x16."""
    for parameter, rows in table.by_parameter.items():
        if not _is_weight(parameter):
            continue
        held = [tensors[row.source] for row in rows if row.source in tensors]
        if any(tensor.kept_dtype != dtype for tensor in held):
            yield parameter.removesuffix(".weight"), INT8_GROUPS


def _is_weight(parameter: str) -> bool:
    """Says whether a parameter is a weight that a layer may have rounded."""
    name = parameter.removesuffix(".weight")
    return parameter.startswith("layers.") and name.split(".", 2)[2] in LAYER_WEIGHTS


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


def write_kept(assembly: Assembly, writer: ParameterWriter, progress: Progress) -> Lost:
    """Writes all parameters of a checkpoint, keeping what its dtypes hold as the source has it.

    Args:
        assembly: fills pieces of parameters.
        writer: of parameters of fp8, int8 or int4 and of floats, in any mixture.
        progress: called with bytes written and bytes in all.

    Returns what rounding changed in the layers. Two pieces and one parameter's scales are in
    memory at a time.
    """
    output = _Output(assembly, writer, progress)
    for name in writer.shapes:
        if name.endswith(".scale"):
            continue  # written with its weight
        dtype = _dtype_of(name, writer.shapes)
        if dtype is None:
            output.copy(name, assembly.fill)
        elif not assembly.keeps(name, dtype):
            output.round(name, dtype)
        elif dtype in GROUPS:
            output.copy(name, partial(assembly.fill_group_values, dtype))
            output.copy(_scale_name(name), partial(assembly.fill_group_scales, dtype))
        else:
            output.copy(name, assembly.fill)
            output.put_scales(name, assembly.stored_scales(name))
    return output.lost


def _dtype_of(name: str, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> str | None:
    """The dtype of a parameter's weight; None for floats."""
    dtype = _DTYPES.get(np.dtype(shapes[name].dtype))
    if dtype == "int8" and shapes[_scale_name(name)].dtype == jnp.float16:
        return INT8_GROUPS
    return dtype


class _Output:
    """Writes parameters piece by piece, while another thread reads the next one, and counts."""

    def __init__(self, assembly: Assembly, writer: ParameterWriter, progress: Progress) -> None:
        self.lost = Lost()
        self._assembly = assembly
        self._writer = writer
        self._progress = progress
        dtypes = (*QUANTIZED, INT8_GROUPS)
        self._rounded = {dtype: jax.jit(partial(_round, dtype=dtype)) for dtype in dtypes}
        self._done, self._total = 0, stored_bytes(writer.shapes)
        progress(self._done, self._total)

    def copy(self, name: str, fill: Fill) -> None:
        """Writes a parameter's pieces as they are filled."""
        array = self._writer.shapes[name]
        cut = pieces({name: array}, self._writer.chunk_bytes)
        for piece, values in filled(cut, np.dtype(array.dtype), fill):
            if name.endswith(".scale"):
                check_scales(name, values)
            self._put(name, piece.index, values.reshape(piece.shape))

    def round(self, name: str, dtype: str) -> None:
        """Writes a weight's pieces rounded, and their scales."""
        array, scale = self._writer.shapes[name], self._writer.shapes[_scale_name(name)]
        in_byte = 2 if dtype == "int4" else 1
        num_weights = array.size * in_byte
        # Weights that have a scale, or a scale and a minimum, of their own.
        width = GROUP_SIZE if dtype == "int4" else num_weights // scale.size
        scales = np.empty((num_weights // width, scale.size * width // num_weights), scale.dtype)
        cut = [
            replace(
                piece,
                shape=(*piece.shape[:-1], piece.shape[-1] * in_byte),
                start=piece.start * in_byte,
            )
            for piece in pieces({name: array}, self._writer.chunk_bytes)
        ]
        for piece, values in filled(cut, np.dtype(np.float32), self._assembly.fill):
            rows = values.reshape(-1, width)
            stored = np.empty((len(rows), width // in_byte), array.dtype)
            step = max(1, _ROUNDED_AT_A_TIME // width)
            for begin in range(0, len(rows), step):
                weight, size, change = self._rounded[dtype](rows[begin : begin + step])
                own = np.asarray(weight.scale).reshape(-1, scales.shape[1])
                first = piece.start // width + begin
                scales[first : first + len(own)] = own
                stored[begin : begin + len(own)] = weight.values
                if name.startswith("layers."):
                    self.lost.weights += float(size)
                    self.lost.changes += float(change)
            shape = (*piece.shape[:-1], piece.shape[-1] // in_byte)
            self._put(name, piece.index, stored.reshape(shape))
        self.lost.parameters += name.startswith("layers.")
        self.put_scales(name, scales)

    def put_scales(self, name: str, scales: np.ndarray) -> None:
        """Writes the scales of a weight, which are in the order of its outputs."""
        scale_name = _scale_name(name)
        check_scales(name, scales)
        self._put(scale_name, ..., scales.reshape(self._writer.shapes[scale_name].shape))

    def _put(self, name: str, index: Any, values: np.ndarray) -> None:
        self._writer.write(name, index, values)
        self._done += values.nbytes
        self._progress(self._done, self._total)


def _round(rows: jax.Array, dtype: str) -> tuple[Weight, jax.Array, jax.Array]:
    """Rows [R I] rounded, and the sums of squares of the rows and of what rounding changes."""
    weight = Weight.quantized(rows, dtype)
    assert weight.scale is not None
    if weight.is_in_groups:
        wide = weight.widened(jnp.float32)
    else:
        wide = weight.values.astype(jnp.float32) * weight.scale[:, None]
    return weight, jnp.sum(jnp.square(rows)), jnp.sum(jnp.square(rows - wide))


def check_scales(name: str, scales: np.ndarray) -> None:
    """Raises ConversionError where a scale of an int4 weight is not finite."""
    if scales.dtype == np.float16 and not np.isfinite(scales).all():
        raise ConversionError(
            [f"{name} has values that float16 scales of groups do not hold; use --dtype bfloat16"]
        )


def _scale_name(name: str) -> str:
    return name.removesuffix("weight") + "scale"
