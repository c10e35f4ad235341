"""Reads stored arrays straight onto the shards of their devices, within a bound of memory.

A process holds the shards of its own devices, once, and `BYTES_IN_FLIGHT` of chunks that are being
read, of as many parameters as these are; where devices have a memory of their own, the host holds
the shards of those and of two more.

Orbax's own `load` begins all shards at once, reads each into an array of the host and copies that
to the device: each of four processes that restore 6 GB together takes up to 4 GiB more than its
part. Its `read_concurrent_bytes` does not help, as it refuses a shard whose chunks are more than
that in all, and where the inputs of experts are split those are the whole matrix of a layer.

On CPU the array of the host becomes that of the device: XLA takes aligned memory as it is. A device
that holds the same shard as another shares its memory then. Chunks are read by plain reads and then
copied: files that are mapped into memory are read a page fault at a time, by one thread a chunk,
which is slower on every disk and far slower on one behind a network.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from mixtral_jax.checkpoint import store
from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.checkpoint.parameters import PARAMS, kvstore, loadable_dtype
from mixtral_jax.checkpoint.store import is_remote, joined
from mixtral_jax.errors import CheckpointError
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.placement import Placement

# Bytes of chunks that are read at once: enough to keep a disk and the cores busy.
BYTES_IN_FLIGHT = 256 << 20
# Keeps a compressed chunk that several shards of this process touch until all have it.
_CACHE_BYTES = 64 << 20
# XLA:CPU takes over memory that is aligned to so many bytes without a copy.
_ALIGNMENT = 64
# Arrays that a device with a memory of its own copies from the host's at the same time.
_TRANSFERS = 2
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
    name = loadable_dtype(folder, card, dtype)
    placement = Placement.of(card.model, name, mesh, weight_dtypes=card.weight_dtypes)
    return load_placed(folder, card, placement, bytes_in_flight), card


def load_placed(
    folder: Path | str, card: Card, placement: Placement, bytes_in_flight: int = BYTES_IN_FLIGHT
) -> Transformer:
    """Restores a checkpoint's weights straight onto the devices of a placement.

    `folder` may be the URL of a store's. `bytes_in_flight` bounds the host's memory, see `restore`.
    Raises CheckpointError if a file of the checkpoint is damaged.
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
    if not is_remote(folder):
        folder = Path(folder).absolute()
    restored = restore(joined(folder, PARAMS), wanted, bytes_in_flight)
    filled = [
        (path, variable.replace(array))
        for (path, variable), array in zip(flat, restored.values(), strict=True)
    ]
    merged: Transformer = nnx.merge(graph, nnx.from_flat_state(filled))
    return merged


def restore(
    params: Path | str,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    bytes_in_flight: int = BYTES_IN_FLIGHT,
) -> dict[str, jax.Array]:
    """Reads all arrays of an Orbax checkpoint by their dotted names, each onto its own sharding.

    An array that is stored as another dtype is cast while it is read. `bytes_in_flight` bounds the
    chunks that are read at once, in stored bytes; one chunk is always read.

    Raises CheckpointError if the names and shapes are not those of the checkpoint, or a file of it
    is damaged.
    """
    context = store.context(cache_pool={"total_bytes_limit": _CACHE_BYTES})
    with _damage_named(params):
        stored_names = _names(params, context)
    if unmatched := sorted(stored_names ^ set(wanted)):
        name = unmatched[0]
        fault = "has" if name in stored_names else "lacks"
        raise CheckpointError(
            f"{params} {fault} {name}, unlike the model; {len(unmatched)} such names"
        )
    # All are opened at once, because opening waits for the disk.
    opened = {name: _open(params, name, context) for name in wanted}
    arrays: dict[str, jax.Array] = {}
    transfers: deque[jax.Array] = deque()
    pending: deque[_ChunkRead] = deque()
    num_bytes = 0

    def finish(read: _ChunkRead) -> int:
        with _damage_named(params, f": {read.name}"):
            for copy in read.copies:
                copy.result()
        if read.array is not None:
            arrays[read.name] = read.array.on_devices()
            # A device copies its shard while others are read; then the host's copy is freed.
            transfers.append(arrays[read.name])
            if len(transfers) > _TRANSFERS:
                jax.block_until_ready(transfers.popleft())
        return read.num_bytes

    for name, want in wanted.items():
        with _damage_named(params, f": {name}"):
            stored = opened.pop(name).result()
        if stored.shape != want.shape:
            raise CheckpointError(
                f"{params}: {name} has the shape {stored.shape}, not {want.shape}"
            )
        array = _Shards(stored, want)
        chunks = sorted(array.touched)
        for chunk in chunks:
            while pending and num_bytes + array.chunk_bytes > bytes_in_flight:
                num_bytes -= finish(pending.popleft())
            num_bytes += array.chunk_bytes
            whole = array if chunk == chunks[-1] else None
            pending.append(_ChunkRead(name, array.read(chunk), array.chunk_bytes, whole))
    for read in pending:
        finish(read)
    return {name: arrays[name] for name in wanted}


class _ChunkRead(NamedTuple):
    """A chunk that is being read into the shards that it touches."""

    name: str
    copies: list[Any]  # futures
    num_bytes: int
    array: "_Shards | None"  # of the array that is complete with it


@contextmanager
def _damage_named(params: Path | str, name: str = "") -> Iterator[None]:
    """Names the array where tensorstore raises, as it does for a file that was cut short."""
    try:
        yield
    except ValueError as error:
        if is_remote(params):
            raise CheckpointError(
                f"{params}{name} cannot be read: {store.reason(params, error)}"
            ) from error
        raise CheckpointError(f"{params}{name} is damaged; {_REMEDY} ({error})") from error


def _names(params: Path | str, context: ts.Context) -> set[str]:
    """Returns the names of all arrays that are stored."""
    end = b"/zarr.json"
    keys = ts.KvStore.open(kvstore(params, ""), context=context).result().list().result()
    return {key.removesuffix(end).decode() for key in keys if key.endswith(end)}


def _open(params: Path | str, name: str, context: ts.Context) -> Any:
    # Cached data are not compared with the file again: nobody writes into a checkpoint.
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore(params, f"{name}/"),
        "recheck_cached_data": False,
    }
    return ts.open(spec, context=context, read=True)


class _Shards:
    """Memory of the host for the shards of an array that the devices of this process hold.

    Args:
        stored: the array of tensorstore.
        want: its shape, dtype and sharding on the devices.
    """

    def __init__(self, stored: Any, want: jax.ShapeDtypeStruct) -> None:
        self._want = want
        self._devices: dict[Box, list[jax.Device]] = {}
        for device, index in want.sharding.addressable_devices_indices_map(want.shape).items():
            bounds = [
                extent.indices(size)[:2] for extent, size in zip(index, want.shape, strict=True)
            ]
            self._devices.setdefault(tuple(bounds), []).append(device)
        self._memory = {
            box: aligned_memory([end - start for start, end in box], want.dtype)
            for box in self._devices
        }
        chunk_shape = stored.chunk_layout.read_chunk.shape
        self.touched: dict[Box, list[Box]] = {}
        """Stored chunks, with the shards that need something of them."""
        for box in self._memory:
            for chunk in _chunks(box, chunk_shape):
                self.touched.setdefault(chunk, []).append(box)
        dtype = stored.dtype.numpy_dtype
        self.chunk_bytes = math.prod(chunk_shape) * dtype.itemsize
        """Stored bytes of a chunk."""
        self._source = ts.cast(stored, want.dtype) if dtype != want.dtype else stored

    def read(self, chunk: Box) -> list[Any]:
        """Begins to read a chunk into all shards that it touches; returns futures."""
        return [_copy(self._source, chunk, box, self._memory[box]) for box in self.touched[chunk]]

    def on_devices(self) -> jax.Array:
        """Begins to copy the shards, which have been read, to their devices."""
        parts = [
            jax.device_put(memory, device)
            for box, memory in self._memory.items()
            for device in self._devices[box]
        ]
        want = self._want
        return jax.make_array_from_single_device_arrays(want.shape, want.sharding, parts)


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


def aligned_memory(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Allocates an array of the host that XLA:CPU takes over without a copy."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)
