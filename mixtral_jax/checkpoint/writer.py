"""Parameters written to a checkpoint, from memory or piece by piece, and read back in pieces.

`ParameterWriter` exists because Orbax saves arrays that are in memory, and the stacked experts of
one Mixtral layer alone take a gigabyte per matrix. It lets Orbax write a checkpoint of the right
tree with arrays of size one, then puts arrays of the real shape in their place, piece by piece.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from mixtral_jax.checkpoint.folder import Card, finished_at
from mixtral_jax.checkpoint.parameters import CHUNK_BYTES, PARAMS, chunk_shape, kvstore, nested
from mixtral_jax.model.arrangement import stored_parameters
from mixtral_jax.model.transformer import Transformer


class ParameterWriter:
    """Writes the `params` of a checkpoint piece by piece, so that no array needs to be in memory.

        with finished_at(folder) as partial:
            writer = ParameterWriter(partial, parameter_shapes(config, dtype))
            writer.write("layers.0.feed_forward.gate.weight", 3, expert)   # index, then value

    Every piece must be written exactly once; nothing checks that here.

    Args:
        folder: an existing folder, in which `params` is made.
        shapes: shape and dtype of every parameter by its dotted name.
        chunk_bytes: a stored chunk has at most so many bytes, see `chunk_shape`.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, jax.ShapeDtypeStruct],
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.path = folder / PARAMS
        self.shapes = shapes
        self.chunk_bytes = chunk_bytes
        context = ocp.Context()
        # These files repeat shapes of the placeholders; they are optional, and would be wrong.
        context.array.saving.array_metadata_store = None
        context.array.saving.enable_write_sharding_file = False
        with context:
            ocp.save(self.path, nested({name: np.zeros((), np.float32) for name in shapes}))
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
        chunk = chunk_shape(want, self.chunk_bytes)
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore(self.path, f"{name}/"),
            "metadata": {
                "shape": list(want.shape),
                "data_type": np.dtype(want.dtype).name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
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
            spec = {"driver": "zarr3", "kvstore": kvstore(self.path, f"{name}/")}
            self._open = (name, ts.open(spec, context=self._context).result())
        stored = self._open[1][index]
        if stored.dtype.numpy_dtype != out.dtype or stored.shape != out.shape:
            raise ValueError(f"{self.path}: {name} is {stored.dtype} {stored.shape}, unexpectedly")
        target = ts.array(out, copy=False)
        target.write(stored.translate_to[(0,) * out.ndim]).result()


def save(
    folder: Path | str,
    model: Transformer,
    card: Card,
    tokenizer_files: Iterable[Path],
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Writes a model that is in memory as a checkpoint folder; raises as `finished_at` does.

    Args:
        folder: a folder that does not exist or is empty.
        model: its parameters, whole or split over a mesh.
        card: the content of the folder's `config.json`.
        tokenizer_files: files that are copied beside it.
        chunk_bytes: a stored chunk has at most so many bytes.
    """
    with finished_at(folder) as partial:
        context = ocp.Context()
        # Else a chunk is what one device held, and whoever reads a part of it needs it all.
        context.array.saving.storage_options.chunk_byte_size = chunk_bytes
        with context:
            ocp.save(partial / PARAMS, nested(stored_parameters(model)))
        card.write(partial)
        for file in tokenizer_files:
            shutil.copy(file, partial)
