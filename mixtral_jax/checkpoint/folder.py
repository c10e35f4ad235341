"""Checkpoint folders: one Orbax checkpoint, with config and tokenizer beside it.

    FOLDER/
        config.json        {"format": "mixtral-jax/1", "name": ..., "provider": ..., "dtype": ...,
                            "model": ModelConfig}
        params/            Orbax; one array per parameter, nested by the dots of its name
        tokenizer.*        whatever `mixtral_jax.tokenization.tokenizer.load` reads

A checkpoint is written under another name and renamed at the end, so a folder that has its name is
whole. Arrays are stored unstacked, one per layer and matrix, in chunks, so that each device reads
its own part only.

`ParameterWriter` exists because Orbax saves arrays that are in memory, and the stacked experts of
one Mixtral layer alone take a gigabyte per matrix. It lets Orbax write a checkpoint of the right
tree with arrays of size one, then puts arrays of the real shape in their place, piece by piece.
Orbax's format is public: a Zarr v3 array per leaf in one OCDBT key-value store
(orbax.readthedocs.io, "Checkpoint Format Guide").
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from mixtral_jax.checkpoint import restore as shards
from mixtral_jax.config import CONFIG_FILE, FORMAT, ModelConfig, is_checkpoint
from mixtral_jax.errors import ConfigError
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.sharding import ShardingRules

PARAMS = "params"
DTYPES = ("float32", "bfloat16", "int8")


def checked_dtype(dtype: Any) -> str:
    """The name of a dtype that models are computed in; raises ConfigError for any other."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; use {' or '.join(DTYPES)}")
    return name


# Bytes of one stored chunk: small enough to bound memory, large enough to stream.
_CHUNK_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Card:
    """What `config.json` of a checkpoint folder says."""

    model: ModelConfig
    dtype: str
    name: str
    provider: str

    def write(self, folder: Path) -> None:
        content = {
            "format": FORMAT,
            "name": self.name,
            "provider": self.provider,
            "dtype": self.dtype,
            "model": self.model.to_json(),
        }
        (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Card":
        """Raises ConfigError if the folder is not a checkpoint of ours."""
        if not is_checkpoint(folder):
            hint = (
                f"convert it first: mixtral-jax convert {folder} DST"
                if (folder / CONFIG_FILE).exists()
                else "give the folder that `mixtral-jax convert SRC DST` made"
            )
            raise ConfigError(f"{folder} is not a mixtral-jax checkpoint; {hint}")
        content = json.loads((folder / CONFIG_FILE).read_text())
        try:
            return cls(
                model=ModelConfig.from_json(content["model"]),
                dtype=content["dtype"],
                name=content["name"],
                provider=content["provider"],
            )
        except KeyError as missing:
            raise ConfigError(
                f"{folder / CONFIG_FILE} lacks {missing}; convert the model anew"
            ) from None


def parameter_shapes(config: ModelConfig, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter by its dotted name."""
    named = named_parameters(Transformer(config, dtype=dtype, rngs=None))
    return {name: variable.get_value() for name, variable in named.items()}


def count_parameters(config: ModelConfig, dtype: Any) -> tuple[int, int]:
    """How many weights a model has, and the bytes that they and the scales of int8 take."""
    shapes = parameter_shapes(config, dtype)
    weights = sum(array.size for name, array in shapes.items() if not name.endswith(".scale"))
    return weights, sum(array.size * array.dtype.itemsize for array in shapes.values())


@contextmanager
def finished_at(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when the block ends without an error.

    Whatever an earlier, killed attempt left behind is removed first. Raises FileExistsError if
    `folder` exists and is not empty.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; remove it or choose another")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        # All data before the name.
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class ParameterWriter:
    """Writes the `params` of a checkpoint piece by piece, so that no array needs to be in memory.

        with finished_at(folder) as partial:
            writer = ParameterWriter(partial, parameter_shapes(config, dtype))
            writer.write("layers.0.feed_forward.gate.weight", 3, expert)   # index, then value

    Every piece must be written exactly once; nothing checks that here.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        self.path = folder / PARAMS
        self.shapes = shapes
        tree: dict[str, Any] = {}
        for name in shapes:
            _put(tree, name, np.zeros((), np.float32))
        context = ocp.Context()
        # These files repeat shapes of the placeholders; they are optional, and would be wrong.
        context.array.saving.array_metadata_store = None
        context.array.saving.enable_write_sharding_file = False
        with context:
            ocp.save(self.path, tree)
        # Chunks are written once and never read back: no cache. `finished_at` waits for the disk
        # once, instead of after each of them.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False})
        self._open: tuple[str, Any] | None = None

    def write(self, name: str, index: Any, value: np.ndarray) -> None:
        """Stores `value` at `index` (an int, slices, or `...`) of the named parameter.

        Pieces of one parameter are best written in order, each a stored chunk (`chunk_shape`).
        `value` may be changed afterwards.
        """
        if self._open is None or self._open[0] != name:
            self._open = (name, self._create(name))
        self._open[1][index].write(value).result()

    def _create(self, name: str) -> Any:
        want = self.shapes[name]
        spec = {
            "driver": "zarr3",
            "kvstore": shards.kvstore(self.path, f"{name}/"),
            "metadata": {
                "shape": list(want.shape),
                "data_type": np.dtype(want.dtype).name,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": list(chunk_shape(want))},
                },
                # Weights hardly compress; storing them as they are is several times faster.
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            },
            "create": True,
            "delete_existing": True,
        }
        return ts.open(spec, context=self._context).result()


class ParameterReader:
    """Reads parameters of a checkpoint piece by piece: what ParameterWriter wrote, or `save`.

    A piece that is not a stored chunk costs the reading of all chunks that it touches.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder.absolute() / PARAMS
        # Pieces are read once: no cache.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._open: tuple[str, Any] | None = None

    def read(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out`, of the stored dtype, with the named parameter's values at `index`.

        Raises ValueError if there is no such parameter, or its dtype or shape does not fit.
        """
        if self._open is None or self._open[0] != name:
            spec = {"driver": "zarr3", "kvstore": shards.kvstore(self.path, f"{name}/")}
            self._open = (name, ts.open(spec, context=self._context).result())
        stored = self._open[1][index]
        if stored.dtype.numpy_dtype != out.dtype or stored.shape != out.shape:
            raise ValueError(f"{self.path}: {name} is {stored.dtype} {stored.shape}, unexpectedly")
        target = ts.array(out, copy=False)
        target.write(stored.translate_to[(0,) * out.ndim]).result()


def chunk_shape(array: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Whole trailing axes; leading axes cut into equal parts until a chunk is small enough.

    Equal, because Zarr stores the last chunk in full size even where the array ends inside it.
    What is int8 is cut as the float32 that it is made of.
    """
    shape = list(array.shape)
    itemsize = 4 if array.dtype == jnp.int8 else np.dtype(array.dtype).itemsize
    for axis, size in enumerate(shape):
        rest = math.prod(shape[axis + 1 :]) * itemsize
        limit = max(1, _CHUNK_BYTES // rest)
        parts = -(-size // limit)
        shape[axis] = -(-size // parts)
        if limit > 1:
            break
    return tuple(shape)


def loadable_dtype(folder: Path, card: Card, dtype: Any) -> str:
    """What the checkpoint is loaded as when `dtype` is asked for; None asks for the stored one.

    Raises ConfigError for what is no dtype of models, and from or to int8.
    """
    name = checked_dtype(dtype or card.dtype)
    if name != card.dtype and "int8" in (name, card.dtype):
        raise ConfigError(
            f"{folder} is stored as {card.dtype} and cannot be loaded as {name}; convert the "
            f"weights anew with --dtype {name}"
        )
    return name


def load(
    folder: Path,
    mesh: Mesh | None = None,
    dtype: Any = None,
    rules: ShardingRules | None = None,
    activations: Any = None,
) -> tuple[Transformer, Card]:
    """Restores a checkpoint straight onto the devices of `mesh`, or onto the default device.

    `dtype` overrides the stored one, except from or to int8; `rules` and `activations` are those of
    Transformer. Raises ConfigError then, or if the folder is no checkpoint.
    """
    card = Card.read(folder)
    dtype = loadable_dtype(folder, card, dtype)
    model = Transformer(
        card.model, dtype=dtype, activations=activations, rngs=None, mesh=mesh, rules=rules
    )
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    one_device = SingleDeviceSharding(jax.devices()[0])
    wanted: dict[str, jax.ShapeDtypeStruct] = {}
    for path, variable in flat:
        want = variable.get_value()
        if mesh is None:
            want = jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=one_device)
        wanted[".".join(map(str, path))] = want
    restored = shards.restore((folder / PARAMS).absolute(), wanted)
    filled = [
        (path, variable.replace(array))
        for (path, variable), array in zip(flat, restored.values(), strict=True)
    ]
    model = nnx.merge(graph, nnx.from_flat_state(filled))
    return model, card


def save(folder: Path, model: Transformer, card: Card, tokenizer_files: Iterable[Path]) -> None:
    """Writes a model that is in memory as a checkpoint folder; see `finished_at` for errors."""
    with finished_at(folder) as partial:
        tree: dict[str, Any] = {}
        for name, variable in named_parameters(model).items():
            _put(tree, name, variable.get_value())
        context = ocp.Context()
        # Else a chunk is what one device held, and whoever reads a part of it needs it all.
        context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
        with context:
            ocp.save(partial / PARAMS, tree)
        card.write(partial)
        for file in tokenizer_files:
            shutil.copy(file, partial)


def _put(tree: dict[str, Any], name: str, leaf: Any) -> None:
    """Sets `leaf` in a nested dict at the dotted name."""
    *parents, last = name.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf
