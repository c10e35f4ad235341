"""Parameters as a checkpoint stores them: names, shapes, dtypes, and the chunks of each array.

Arrays are stored unstacked, one per layer and matrix, in chunks, so that each device reads its own
part only. Orbax's format is public: a Zarr v3 array per leaf in one OCDBT key-value store
(orbax.readthedocs.io, "Checkpoint Format Guide").
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.checkpoint.store import is_remote, spec
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.placement import Placement, WeightDtypes, checked_dtype
from mixtral_jax.weight import QUANTIZED, is_quantized

PARAMS = "params"
# Bytes of one stored chunk: small enough to bound memory, large enough to stream.
CHUNK_BYTES = 32 << 20


def parameter_shapes(
    config: ModelConfig, dtype: DTypeLike, weight_dtypes: Mapping[str, str] | WeightDtypes = ()
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of every parameter by its dotted name; see `Placement.of`."""
    placement = Placement.of(config, dtype, mesh=None, weight_dtypes=weight_dtypes)
    named = named_parameters(Transformer(config, placement, rngs=None))
    return {name: variable.get_value() for name, variable in named.items()}


def count_parameters(
    config: ModelConfig, dtype: DTypeLike, weight_dtypes: Mapping[str, str] | WeightDtypes = ()
) -> tuple[int, int]:
    """Returns the number of weights, and the bytes that they and their scales take."""
    shapes = parameter_shapes(config, dtype, weight_dtypes)
    weights = 0
    for name, array in shapes.items():
        if not name.endswith(".scale"):
            weights += array.size * (2 if array.dtype == QUANTIZED["int4"] else 1)
    return weights, stored_bytes(shapes)


def stored_bytes(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Returns the bytes that arrays of these shapes take."""
    return sum(array.size * np.dtype(array.dtype).itemsize for array in shapes.values())


def loadable_dtype(folder: Path | str, card: Card, dtype: Any) -> str:
    """Returns what a checkpoint is loaded as when `dtype` is asked for; None asks for the stored.

    Raises ConfigError for what is no dtype of models, and from or to int8, int4 or fp8.
    """
    name = checked_dtype(card.dtype if dtype is None else dtype)
    if name != card.dtype and (is_quantized(name) or is_quantized(card.dtype)):
        raise ConfigError(
            f"{folder} is stored as {card.dtype} and cannot be loaded as {name}; convert the "
            f"weights anew with --dtype {name}"
        )
    return name


def chunk_shape(array: jax.ShapeDtypeStruct, chunk_bytes: int = CHUNK_BYTES) -> tuple[int, ...]:
    """Returns the shape of the chunks in which an array is stored.

    Trailing axes stay whole; leading axes are cut into equal parts until a chunk is small enough.
    Parts are equal because Zarr stores the last chunk in full size even where the array ends
    inside it. An array of int8 or fp8 is cut as the float32 that it is made of.
    """
    shape = list(array.shape)
    dtype = np.dtype(array.dtype)
    itemsize = 4 if dtype in QUANTIZED.values() else dtype.itemsize
    for axis, size in enumerate(shape):
        rest = math.prod(shape[axis + 1 :]) * itemsize
        limit = max(1, chunk_bytes // rest)
        parts = -(-size // limit)
        shape[axis] = -(-size // parts)
        if limit > 1:
            break
    return tuple(shape)


def kvstore(params: Path | str, path: str) -> dict[str, Any]:
    """Returns tensorstore's spec of Orbax's key-value store.

    Args:
        params: the checkpoint's folder of parameters, which may be the URL of a store's.
        path: the dotted name of an array and a slash, or "" for all of them.
    """
    base = spec(f"{params}/state") if is_remote(params) else f"file://{params}/state/"
    return {"driver": "ocdbt", "base": base, "path": path}


def nested(named: dict[str, Any]) -> dict[str, Any]:
    """Returns the tree of dicts whose leaves have the given dotted names."""
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = leaf
    return tree
