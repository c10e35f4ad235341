"""Reads stored arrays straight onto the shards of their devices, within a bound of memory.

A process holds the shards of its own devices, once, and `BYTES_IN_FLIGHT` of chunks that are being
read; where devices have a memory of their own, the host holds the shards of two parameters at most.

Orbax's own `load` begins all shards at once, reads each into an array of the host and copies that
to the device: each of four processes that restore 6 GB together takes up to 4 GiB more than its
part. Its `read_concurrent_bytes` does not help, as it refuses a shard whose chunks are more than
that in all, and where the inputs of experts are split those are the whole matrix of a layer.

On CPU the array of the host becomes that of the device: XLA takes aligned memory as it is. A device
that holds the same shard as another shares its memory then. Files are mapped into memory, so that
chunks that are being read are not copied from the page cache first.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.checkpoint.parameters import PARAMS, kvstore, loadable_dtype
from mixtral_jax.errors import CheckpointError
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.placement import Placement

# Bytes of chunks that are read at once: enough to keep a disk and the cores busy.
BYTES_IN_FLIGHT = 256 << 20
# Keeps a compressed chunk that several shards of this process touch until all have it.
_CACHE_BYTES = 64 << 20
# XLA:CPU takes over memory that is aligned to so many bytes without a copy.
_ALIGNMENT = 64
_REMEDY = "copy the checkpoint or convert it again"

Box = tuple[tuple[int, int], ...]  # start and end in each dimension


def load(
    folder: Path,
    mesh: Mesh | str | None = None,
    dtype: DTypeLike | None = None,
    bytes_in_flight: int = BYTES_IN_FLIGHT,
) -> tuple[Transformer, Card]:
    """Restores a checkpoint onto the devices of `mesh`; None takes the first device.

    Raises ConfigError if the folder is no checkpoint, cannot be loaded as `dtype`, or its model
    cannot be split over the mesh.
    """
    card = Card.read(folder)
    placement = Placement.of(card.model, loadable_dtype(folder, card, dtype), mesh)
    return load_placed(folder, card, placement, bytes_in_flight), card


def load_placed(
    folder: Path, card: Card, placement: Placement, bytes_in_flight: int = BYTES_IN_FLIGHT
) -> Transformer:
    """Restores a checkpoint's weights straight onto the devices of a placement.

    `bytes_in_flight` bounds the host's memory, see `restore`. Raises CheckpointError if a file of
    the checkpoint is damaged.
    """
    model = Transformer(card.model, placement, rngs=None)
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    one_device = SingleDeviceSharding(jax.devices()[0])
    wanted: dict[str, jax.ShapeDtypeStruct] = {}
    for path, variable in flat:
        want = variable.get_value()
        if placement.layout is None:
            want = jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=one_device)
        wanted[".".join(map(str, path))] = want
    restored = restore((folder / PARAMS).absolute(), wanted, bytes_in_flight)
    filled = [
        (path, variable.replace(array))
        for (path, variable), array in zip(flat, restored.values(), strict=True)
    ]
    merged: Transformer = nnx.merge(graph, nnx.from_flat_state(filled))
    return merged


def restore(
    params: Path,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    bytes_in_flight: int = BYTES_IN_FLIGHT,
) -> dict[str, jax.Array]:
    """Reads all arrays of an Orbax checkpoint by their dotted names, each onto its own sharding.

    An array that is stored as another dtype is cast while it is read. `bytes_in_flight` bounds the
    chunks that are read at once, in stored bytes; one chunk is always read.

    Raises CheckpointError if the names and shapes are not those of the checkpoint, or a file of it
    is damaged.
    """
    context = ts.Context(
        {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}, "file_io_mode": {"mode": "memmap"}}
    )
    try:
        stored_names = _names(params, context)
    except ValueError as error:
        raise CheckpointError(f"{params} is damaged; {_REMEDY} ({error})") from error
    if unmatched := sorted(stored_names ^ set(wanted)):
        name = unmatched[0]
        fault = "has" if name in stored_names else "lacks"
        raise CheckpointError(
            f"{params} {fault} {name}, unlike the model; {len(unmatched)} such names"
        )
    # All are opened at once, because opening waits for the disk.
    opened = {name: _open(params, name, context) for name in wanted}
    arrays: dict[str, jax.Array] = {}
    before = None
    for name, want in wanted.items():
        try:
            stored = opened[name].result()
            if stored.shape == want.shape:
                arrays[name] = _read(stored, want, bytes_in_flight)
        except ValueError as error:  # tensorstore's, such as of a file cut short
            raise CheckpointError(f"{params}: {name} is damaged; {_REMEDY} ({error})") from error
        if stored.shape != want.shape:
            raise CheckpointError(
                f"{params}: {name} has the shape {stored.shape}, not {want.shape}"
            )
        # A device copies its shard while the next array is read; then the host's copy is freed.
        jax.block_until_ready(before)
        before = arrays[name]
    return arrays


def _names(params: Path, context: ts.Context) -> set[str]:
    """Returns the names of all arrays that are stored."""
    end = b"/zarr.json"
    keys = ts.KvStore.open(kvstore(params, ""), context=context).result().list().result()
    return {key.removesuffix(end).decode() for key in keys if key.endswith(end)}


def _open(params: Path, name: str, context: ts.Context) -> Any:
    # Cached data are not compared with the file again: nobody writes into a checkpoint.
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore(params, f"{name}/"),
        "recheck_cached_data": False,
    }
    return ts.open(spec, context=context, read=True)


def _read(stored: Any, want: jax.ShapeDtypeStruct, bytes_in_flight: int) -> jax.Array:
    """Reads an array chunk by chunk, each into all shards of this process that it touches."""
    devices: dict[Box, list[jax.Device]] = {}
    for device, index in want.sharding.addressable_devices_indices_map(want.shape).items():
        bounds = [extent.indices(size)[:2] for extent, size in zip(index, want.shape, strict=True)]
        devices.setdefault(tuple(bounds), []).append(device)
    shards = {
        box: aligned_memory([end - start for start, end in box], want.dtype) for box in devices
    }
    chunk_shape = stored.chunk_layout.read_chunk.shape
    touched: dict[Box, list[Box]] = {}
    for box in shards:
        for chunk in _chunks(box, chunk_shape):
            touched.setdefault(chunk, []).append(box)
    chunk_bytes = math.prod(chunk_shape) * stored.dtype.numpy_dtype.itemsize
    max_pending = max(1, bytes_in_flight // chunk_bytes)
    source = ts.cast(stored, want.dtype) if stored.dtype.numpy_dtype != want.dtype else stored
    pending_reads: deque[list[Any]] = deque()
    for chunk in sorted(touched):
        if len(pending_reads) == max_pending:
            _finish(pending_reads.popleft())
        pending_reads.append([_copy(source, chunk, box, shards[box]) for box in touched[chunk]])
    for copies in pending_reads:
        _finish(copies)
    arrays = [jax.device_put(shards[box], device) for box in devices for device in devices[box]]
    return jax.make_array_from_single_device_arrays(want.shape, want.sharding, arrays)


def _chunks(box: Box, shape: Sequence[int]) -> Iterator[Box]:
    """Yields the stored chunks, of the given shape, that a box touches."""
    starts = [
        range(start - start % size, end, size)
        for (start, end), size in zip(box, shape, strict=True)
    ]
    for corner in product(*starts):
        yield tuple((start, start + size) for start, size in zip(corner, shape, strict=True))


def _copy(source: Any, chunk: Box, box: Box, shard: np.ndarray) -> Any:
    """Begins to copy the overlap of a chunk and a shard; returns a future."""
    overlap = tuple(
        slice(max(start, first), min(end, last))
        for (start, end), (first, last) in zip(chunk, box, strict=True)
    )
    target = ts.array(shard, copy=False)[ts.d[:].translate_to[[start for start, _ in box]]]
    return target[overlap].write(source[overlap])


def _finish(copies: list[Any]) -> None:
    for copy in copies:
        copy.result()


def aligned_memory(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Allocates an array of the host that XLA:CPU takes over without a copy."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)
