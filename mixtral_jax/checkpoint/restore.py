"""Reads stored arrays straight onto the shards of their devices, within a bound of memory.

A process holds the parts of its own devices, once, and `_IN_FLIGHT` bytes of chunks on their way;
where devices have a memory of their own, the host has the parts of two parameters at most.

Orbax's own `load` begins all shards at once, reads each into an array of the host and copies that
to the device: each of four processes that restore 6 GB together takes up to 4 GiB more than its
part. Its `read_concurrent_bytes` does not help, as it refuses a shard whose chunks are more than
that in all, and where the inputs of experts are split those are the whole matrix of a layer.

On CPU the array of the host becomes that of the device: XLA takes aligned memory as it is. A device
that holds the same part as another shares its memory then. Files are mapped, so that what is on its
way was not copied from the page cache first.
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

# Bytes of chunks that are on their way at once: enough to keep a disk and the cores busy.
_IN_FLIGHT = 256 << 20
# Keeps a compressed chunk that several shards of this process touch until all have it.
_CACHE = 64 << 20
# Of memory that XLA:CPU takes over without a copy.
_ALIGNMENT = 64

Box = tuple[tuple[int, int], ...]  # start and end in each dimension


def kvstore(params: Path, path: str) -> dict[str, str]:
    """Where Orbax keeps arrays; `path` is the name of one and a slash, or nothing."""
    return {"driver": "ocdbt", "base": f"file://{params}/state/", "path": path}


def restore(params: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """All arrays of an Orbax checkpoint by their dotted names, each on its own sharding.

    What is stored as another dtype is cast on its way. Raises ValueError if the names and shapes
    are not those of the checkpoint, or a file of it is damaged.
    """
    context = ts.Context(
        {"cache_pool": {"total_bytes_limit": _CACHE}, "file_io_mode": {"mode": "memmap"}}
    )
    stored_names = _names(params, context)
    if odd := sorted(stored_names ^ set(wanted)):
        fault = "has" if odd[0] in stored_names else "lacks"
        raise ValueError(f"{params} {fault} {odd[0]}, unlike the model; {len(odd)} such names")
    # All are opened at once, as each waits for the disk.
    opened = {name: _open(params, name, context) for name in wanted}
    arrays: dict[str, jax.Array] = {}
    before = None
    for name, want in wanted.items():
        stored = opened[name].result()
        if stored.shape != want.shape:
            raise ValueError(f"{params}: {name} has the shape {stored.shape}, not {want.shape}")
        try:
            arrays[name] = _read(stored, want)
        except ValueError as error:  # as tensorstore says it, such as of a file cut short
            raise ValueError(
                f"{params}: {name} is damaged; copy the checkpoint or convert it again ({error})"
            ) from error
        # A device takes its part while the next is read; then the host's is free.
        jax.block_until_ready(before)
        before = arrays[name]
    return arrays


def _names(params: Path, context: ts.Context) -> set[str]:
    """Of all arrays that are stored."""
    end = b"/zarr.json"
    keys = ts.KvStore.open(kvstore(params, ""), context=context).result().list().result()
    return {key.removesuffix(end).decode() for key in keys if key.endswith(end)}


def _open(params: Path, name: str, context: ts.Context) -> Any:
    # What is in the cache is not compared with the file again: nobody writes into a checkpoint.
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore(params, f"{name}/"),
        "recheck_cached_data": False,
    }
    return ts.open(spec, context=context, read=True)


def _read(stored: Any, want: jax.ShapeDtypeStruct) -> jax.Array:
    """One array: chunk by chunk, each into all shards of this process that it touches."""
    devices: dict[Box, list[jax.Device]] = {}
    for device, index in want.sharding.addressable_devices_indices_map(want.shape).items():
        bounds = [part.indices(size)[:2] for part, size in zip(index, want.shape, strict=True)]
        devices.setdefault(tuple(bounds), []).append(device)
    shards = {box: _aligned(box, want.dtype) for box in devices}
    chunk = stored.chunk_layout.read_chunk.shape
    touched: dict[Box, list[Box]] = {}
    for box in shards:
        for cell in _cells(box, chunk):
            touched.setdefault(cell, []).append(box)
    most = max(1, _IN_FLIGHT // (math.prod(chunk) * stored.dtype.numpy_dtype.itemsize))
    source = ts.cast(stored, want.dtype) if stored.dtype.numpy_dtype != want.dtype else stored
    coming: deque[list[Any]] = deque()
    for cell in sorted(touched):
        if len(coming) == most:
            _finish(coming.popleft())
        coming.append([_copy(source, cell, box, shards[box]) for box in touched[cell]])
    for copies in coming:
        _finish(copies)
    parts = [jax.device_put(shards[box], device) for box in devices for device in devices[box]]
    return jax.make_array_from_single_device_arrays(want.shape, want.sharding, parts)


def _cells(box: Box, chunk: Sequence[int]) -> Iterator[Box]:
    """The stored chunks that a box touches."""
    starts = [
        range(start - start % size, end, size)
        for (start, end), size in zip(box, chunk, strict=True)
    ]
    for corner in product(*starts):
        yield tuple((start, start + size) for start, size in zip(corner, chunk, strict=True))


def _copy(source: Any, cell: Box, box: Box, shard: np.ndarray) -> Any:
    """Begins to copy what a chunk and a shard have in common: a future."""
    both = [
        slice(max(start, first), min(end, last))
        for (start, end), (first, last) in zip(cell, box, strict=True)
    ]
    target = ts.array(shard, copy=False)[ts.d[:].translate_to[[start for start, _ in box]]]
    return target[tuple(both)].write(source[tuple(both)])


def _finish(copies: list[Any]) -> None:
    for copy in copies:
        copy.result()


def _aligned(box: Box, dtype: Any) -> np.ndarray:
    """Memory for a shard."""
    shape = [end - start for start, end in box]
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)
