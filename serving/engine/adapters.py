"""Adapters of an engine: which it has, in which slot of the stacks, and how they come and go.

An adapter is loaded into a free slot between two steps, without a compilation. A request is seated
when it comes: it keeps its slot, and the digest that its prefixes are kept under, until it ends,
whatever its name means later. A name that is unloaded, or loaded anew, is another matter for later
requests at once, while its slot stays as it is until those that use it have ended.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from mixtral_jax.checkpoint.adapter import StoredAdapter, read_adapter
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import AdapterError
from mixtral_jax.model.adapter_stack import StackSizes
from serving.engine.device import PutLayer
from serving.errors import ModelNotFound, Overloaded
from serving.scheduling.request import Request, Seat


@dataclass(frozen=True)
class _Loaded:
    slot: int
    digest: str


class SlotsBusy(Overloaded):
    """No slot is free yet, but some will be when the requests that use them have ended."""


class NoRoom(AdapterError):
    """All slots are taken by adapters that are loaded."""


class AdapterSlots:
    """The adapters of an engine by their names. Used by the engine's thread, but for `read` and
    `digests`.

    Args:
        config: of the model.
        sizes: of the stacks.
    """

    def __init__(self, config: ModelConfig, sizes: StackSizes) -> None:
        self._config, self._sizes = config, sizes
        self._loaded: Mapping[str, _Loaded] = {}  # replaced, never changed: other threads read it

    @property
    def digests(self) -> Mapping[str, str]:
        """The digests of the loaded adapters by their names."""
        return {name: loaded.digest for name, loaded in self._loaded.items()}

    def read(self, folder: Path | str) -> StoredAdapter:
        """Reads an adapter from its folder, in PEFT's form.

        Raises AdapterError where it is broken, does not fit the model, has a larger rank than the
        stacks, changes weights that have no stack, or changes nothing at all.
        """
        stored = read_adapter(folder, self._config, max_rank=self._sizes.rank)
        beyond = [name for name in stored.settings.targets if name not in self._sizes.targets]
        if beyond:
            raise AdapterError(
                f"{folder} changes {', '.join(beyond)}, and this server keeps room for adapters of "
                f"{', '.join(self._sizes.targets)}, as those of --adapter need it; start it with "
                "this one as an --adapter too, or with --adapters-folder"
            )
        if not stored.num_layers_changed:
            raise AdapterError(
                f"{folder} changes nothing, for all its matrices B are zero, and the model itself "
                "would answer under its name; give one that has been trained"
            )
        return stored

    def load(
        self,
        name: str,
        stored: StoredAdapter,
        is_used: Callable[[int], bool],
        put: Callable[[PutLayer], None],
    ) -> None:
        """Loads an adapter under a name, in the place of an older one of this name.

        Args:
            name: which requests give.
            stored: as `read` returned it.
            is_used: says whether a request that has not ended uses a slot.
            put: writes a layer of it. What it raises leaves all names as they were.

        Raises SlotsBusy if a slot is free as soon as requests of unloaded adapters have ended, and
        NoRoom if none will be.
        """
        before = self._loaded.get(name)
        if before is not None and before.digest == stored.digest:
            return
        named = {loaded.slot for loaded in self._loaded.values()}
        unnamed = [slot for slot in range(self._sizes.slots) if slot not in named]
        free = [slot for slot in unnamed if not is_used(slot)]
        if not free and unnamed:
            raise SlotsBusy(
                f"the adapter '{name}' waits for requests of an unloaded one; try again shortly"
            )
        if not free:
            raise NoRoom(
                f"there is no room for the adapter '{name}': {self._sizes.slots} are loaded; "
                "unload one, or start with a larger --max-adapters"
            )
        for layer in _layers(free[0], stored):
            put(layer)
        self._loaded = {**self._loaded, name: _Loaded(free[0], stored.digest)}

    def unload(self, name: str) -> None:
        """Refuses later requests for an adapter; its slot is free when the others have ended.

        Raises AdapterError for a name that is not loaded.
        """
        if name not in self._loaded:
            raise AdapterError(f"no adapter with the name '{name}' is loaded")
        self._loaded = {other: kept for other, kept in self._loaded.items() if other != name}

    def seated(self, request: Request) -> Request:
        """Returns a request with the slot of its adapter; raises ModelNotFound if it has gone."""
        loaded = self._loaded.get(request.adapter)
        if loaded is None:
            raise ModelNotFound(f"The adapter '{request.adapter[:100]}' is not loaded any more")
        return replace(request, seat=Seat(loaded.slot, bytes.fromhex(loaded.digest)))


class LoadingEngine(Protocol):
    """An engine that has adapters, or has room for none."""

    @property
    def adapters(self) -> AdapterSlots | None:
        """Those that it has; None if it was made without stacks."""

    def load_adapter(self, name: str, stored: StoredAdapter) -> None:
        """Loads an adapter, between two steps; see `AdapterSlots.load`."""


class AdapterLoader:
    """Loads and unloads the adapters of an engine that runs. For any thread but the engine's.

    Args:
        engine: touched by its thread alone.
        call: has that thread call a function between two steps (`EngineWorker.call`).
    """

    def __init__(self, engine: LoadingEngine, call: Callable[[Callable[[], None]], None]) -> None:
        self._engine, self._call = engine, call

    def read(self, name: str, folder: Path | str) -> Callable[[], None]:
        """Reads an adapter into memory; returns the function that loads it under a name.

        That function writes it to the devices between two steps, in the place of an older one of
        this name; nothing is compiled. It raises SlotsBusy or NoRoom as `AdapterSlots.load` does,
        and may then be called again, and what `call` raises if the engine has ended; the older one
        then stays.

        Raises AdapterError if the adapter is broken, or does not fit the model or its stacks.
        """
        stored = self._slots(name).read(folder)

        def load() -> None:
            self._call(lambda: self._engine.load_adapter(name, stored))

        return load

    def unload(self, name: str) -> None:
        """Refuses later requests for an adapter; those that run go on, and then its slot is free.

        Raises AdapterError for a name that is not loaded.
        """
        slots = self._slots(name)
        self._call(lambda: slots.unload(name))

    def digests(self) -> Mapping[str, str]:
        """Returns the digests of the loaded adapters by their names."""
        slots = self._engine.adapters
        return {} if slots is None else slots.digests

    def _slots(self, name: str) -> AdapterSlots:
        if self._engine.adapters is None:
            raise AdapterError(
                f"there is no place for the adapter '{name}': the server was started without "
                "--adapter and --adapters-folder"
            )
        return self._engine.adapters


def _layers(slot: int, stored: StoredAdapter) -> Iterator[PutLayer]:
    """Yields the layers of an adapter as the stacks take them."""
    scaling = stored.settings.scaling
    for i, block in enumerate(stored.adapter.layers):
        matrices = {
            target: (np.asarray(low.a), np.asarray(low.b) * np.float32(scaling))
            for target, low in block._asdict().items()
            if low is not None
        }
        yield PutLayer(slot, i, matrices)
