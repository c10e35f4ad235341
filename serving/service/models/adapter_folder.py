"""A folder whose subfolders are adapters: they are loaded and unloaded as they come and go.

The folder is looked at every second. A subfolder is loaded when none of its files has changed
between two looks, so that one that is still being copied is left alone, and again when they have
changed later. What may be half a copy, because it cannot be read, or because only one of the two
files of an adapter is new, is given SETTLE_SECONDS of rest: it is neither loaded nor an error
before.

One that cannot be loaded changes nothing for requests: the reason is logged once, and it is tried
again when its files change, or when another one has made room; at each look where the reason may
pass by itself, such as an error of the system. One that waits for requests to end keeps its turn,
and nothing else waits for them but adapters that need a slot too. A subfolder whose name begins
with a dot is none: an adapter that is written there, and then renamed, comes as a whole.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mixtral_jax.errors import UserError
from serving.engine.adapters import NoRoom, SlotsBusy
from serving.errors import ServingError
from serving.service.models.adapter_files import Pair, Version, check_links, other_files

LOOK_SECONDS = 1.0
"""Seconds from one look at the folder to the next."""
SETTLE_SECONDS = 10.0
"""Seconds without a change after which a subfolder is taken as it is."""
_END_SECONDS = 5.0  # a load that is under way is not waited for any longer

logger = logging.getLogger(__name__)


class LoadsAdapters(Protocol):
    """Reads, loads and unloads adapters, such as `serving.engine.adapters.AdapterLoader`.

    Its methods may be called by any thread.
    """

    def read(self, name: str, folder: Path | str) -> Callable[[], None]:
        """Reads an adapter; returns the function that loads it under a name, without waiting.

        Raises UserError if it cannot be used. That function raises NoRoom, SlotsBusy, or another
        ServingError; an older one of this name then stays.
        """

    def unload(self, name: str) -> None:
        """Refuses later requests for an adapter, and frees its memory when it has answered all."""

    def digests(self) -> Mapping[str, str]:
        """Returns the digests of the loaded adapters by their names."""


@dataclass
class _Subfolder:
    """State of a subfolder that has a file of an adapter."""

    files: tuple[Pair, tuple[tuple[str, Version], ...]] | None = None
    """Its files at the last look."""
    since: float = 0.0
    """Time of the first look at which they were so."""
    loaded: Pair | None = None
    """The files that are loaded under its name."""
    done: Pair | None = None
    """Files for which there is nothing to do: they are loaded, or cannot be."""
    reason: str | None = None
    """Why it cannot be loaded as it is."""
    is_doubted: bool = False
    """True if the files could not be read, and may be half a copy."""
    load: Callable[[], None] | None = None
    """Loads what was read and is not loaded yet."""
    is_waiting: bool = False
    """True if it waits for a slot, as the log says."""


class AdapterFolder:
    """Follows a folder of adapters.

    Args:
        folder: The folder.
        loader: Loads them.
        check_name: Raises UserError for a name that none of these adapters may have.
        on_failure: Called whenever an adapter cannot be loaded.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        folder: Path,
        loader: LoadsAdapters,
        check_name: Callable[[str], None],
        on_failure: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._loader = loader
        self._check_name = check_name
        self._on_failure = on_failure
        self._clock = clock
        self._known: dict[str, _Subfolder] = {}
        self._is_missing = False
        self._is_full = False  # in this look: who needs a slot has to wait for requests to end
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="adapters", daemon=True)

    @property
    def num_failed(self) -> int:
        """The number of subfolders that cannot be loaded as they are now."""
        return sum(known.reason is not None for known in list(self._known.values()))

    def start(self) -> None:
        """Loads what is there and at rest; looks every second from now on, until `stop`."""
        self.look()
        self._end.wait(LOOK_SECONDS)
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """Looks no more; waits a little for a load that is under way."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(_END_SECONDS)

    def look(self) -> None:
        """Unloads what has gone, and loads what is new or has changed and is now at rest."""
        try:
            names = [name for name in os.listdir(self._folder) if not name.startswith(".")]
        except OSError as error:
            if not self._is_missing:
                logger.error("adapters stay as they are: %s", error)
            self._is_missing = True
            return
        self._is_missing = self._is_full = False
        for name in self._known.keys() - set(names):
            self._forget(name)
        now = self._clock()
        for name in sorted(names, key=self._turn):
            try:
                self._look_at(name, now)
            except ServingError:
                raise
            except Exception as error:  # a bug of ours, which must not keep others from their turn
                logger.exception("the adapter %r met an error", name[:100])
                self._fail(name, error, None)

    def _follow(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            try:
                self.look()
            except ServingError as error:  # the engine has ended, and so does the process
                logger.error("the folder of adapters is not followed any more: %s", error)
                return
            except Exception:  # as above
                logger.exception("the folder of adapters could not be looked at")

    def _turn(self, name: str) -> tuple[bool, float, str]:
        """Sorts those that wait for a slot before all others, the oldest first."""
        known = self._known.get(name)
        if known is None or not known.is_waiting:
            return (True, 0.0, name)
        return (False, known.since, name)

    def _look_at(self, name: str, now: float) -> None:
        """Takes a subfolder as far as it can go now."""
        folder = self._folder / name
        try:
            pair = Pair.of(folder)
            if pair.is_missing:
                self._forget(name)
                return
            known = self._known.setdefault(name, _Subfolder())
            if pair == known.done:
                return
            files = (pair, other_files(folder))
        except OSError as error:  # what is loaded stays
            self._fail(name, error, None)
            return
        if files != known.files:
            known.files, known.since = files, now
            known.is_doubted, known.load, known.is_waiting = False, None, False
            return
        is_settled = now - known.since >= SETTLE_SECONDS
        if self._is_full or not is_settled and (known.is_doubted or pair.is_odd(known.loaded)):
            return
        if known.load is None:
            known.load = self._read(name, pair, is_settled)
        if known.load is not None:
            self._put(name, known, pair, known.load)

    def _read(self, name: str, pair: Pair, is_settled: bool) -> Callable[[], None] | None:
        """Returns the function that loads an adapter; None if it cannot be read as it is now."""
        folder = self._folder / name
        try:
            self._check_name(name)
            check_links(folder, self._folder)
        except UserError as error:
            self._fail(name, error, pair)
            return None
        try:
            load = self._loader.read(name, folder)
            has_changed = Pair.of(folder) != pair  # then it may be of two versions
        except UserError as error:
            if is_settled:
                self._fail(name, error, pair)
            else:
                self._known[name].is_doubted = True
            return None
        except OSError as error:
            self._fail(name, error, None)
            return None
        return None if has_changed else load

    def _put(self, name: str, known: _Subfolder, pair: Pair, load: Callable[[], None]) -> None:
        """Loads an adapter; where all room is taken, in that of the older one of this name.

        Requests for it are then refused until those that the older one answers have ended.
        """
        try:
            try:
                load()
            except NoRoom:
                if known.loaded is None:
                    raise
                self._unload(name, known)
                load()
        except SlotsBusy as error:
            self._is_full = True
            if not known.is_waiting:
                logger.info("%s", error)
            known.is_waiting, known.reason = True, None
        except (UserError, ServingError) as error:
            self._fail(name, error, pair if isinstance(error, UserError) else None)
        else:
            logger.info("loaded the adapter '%s'", name)
            known.loaded = known.done = pair
            known.load, known.reason, known.is_waiting = None, None, False

    def _fail(self, name: str, error: Exception, done: Pair | None) -> None:
        """Counts an adapter that cannot be loaded.

        Args:
            name: Of its subfolder.
            error: Why.
            done: Its files, where it is not to be tried again as long as they are these.
        """
        known = self._known.setdefault(name, _Subfolder())
        if known.reason != str(error):
            logger.error("the adapter %r is not loaded: %s", name[:100], error)
        known.reason, known.done = str(error), done
        known.load, known.is_waiting = None, False
        self._on_failure()

    def _forget(self, name: str) -> None:
        """Unloads an adapter whose files have gone."""
        known = self._known.get(name)
        if known is not None and known.loaded is not None:
            self._unload(name, known)
        self._known.pop(name, None)

    def _unload(self, name: str, known: _Subfolder) -> None:
        self._loader.unload(name)
        logger.info("unloaded the adapter '%s'", name)
        known.loaded = known.done = None
        for other in self._known.values():  # there is room again
            if other.reason is not None:
                other.done = None
