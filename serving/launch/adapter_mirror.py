"""A copy of a store's folder of adapters, kept up to date, which an AdapterFolder can follow."""

import logging
import os
import shutil
import threading
from typing import Any

import tensorstore as ts

from mixtral_jax.checkpoint.store import context, reason, refusals_named, scratch_folder, spec
from mixtral_jax.errors import AdapterError
from serving.service.models.adapter_files import FILES

LOOK_SECONDS = 5.0
"""Seconds from one look at the store to the next."""

_log = logging.getLogger(__name__)


class AdapterMirror:
    """Copies the two files of each adapter of a store's folder, when they are new or have changed.

    Files that have gone from the store go from the copy. While the store does not answer, the copy
    stays as it is, and the reason is logged once.

    Args:
        place: URL of the folder.
    """

    def __init__(self, place: str) -> None:
        self.folder = scratch_folder()
        """The copy."""
        self._place = place.rstrip("/")
        with refusals_named(place, AdapterError):
            self._store = ts.KvStore.open(spec(place), context=context()).result()
        self._generations: dict[str, Any] = {}  # of the files that are in the copy
        self._problem: str | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="adapters' store", daemon=True)

    def start(self) -> None:
        """Copies what is there; raises AdapterError if the store cannot be read. Then goes on."""
        with refusals_named(self._place, AdapterError):
            self.look()
        self._thread.start()

    def stop(self) -> None:
        """Looks no more."""
        self._end.set()

    def look(self) -> None:
        """Makes the copy what the store has now; raises what tensorstore raises."""
        listed = [key.decode() for key in self._store.list().result()]
        parts = [(name, *name.split("/")) for name in listed]
        names = [p[0] for p in parts if len(p) == 3 and p[2] in FILES and not p[1].startswith(".")]
        for name in self._generations.keys() - set(names):
            self._remove(name)
        known = {name: self._generations.get(name) for name in names}
        reads = {
            name: self._store.read(name, if_not_equal=generation)
            if generation is not None
            else self._store.read(name)
            for name, generation in known.items()
        }
        for name, read in reads.items():
            result = read.result()
            if result.state == "value":
                self._put(name, result.value)
                self._generations[name] = result.stamp.generation

    def _put(self, name: str, content: bytes) -> None:
        file = self.folder / name
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_bytes(content)
        os.replace(partial, file)

    def _remove(self, name: str) -> None:
        del self._generations[name]
        file = self.folder / name
        file.unlink(missing_ok=True)
        if not any(other.split("/")[0] == file.parent.name for other in self._generations):
            shutil.rmtree(file.parent, ignore_errors=True)

    def _follow(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            try:
                self.look()
                self._problem = None
            except (ValueError, OSError) as error:
                problem = (
                    reason(self._place, error) if isinstance(error, ValueError) else str(error)
                )
                if problem != self._problem:
                    _log.error("adapters of %s stay as they are: %s", self._place, problem)
                self._problem = problem
