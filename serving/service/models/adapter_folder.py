"""A folder whose subfolders are adapters: they are loaded and unloaded as they come and go.

The folder is looked at every second. A subfolder is loaded when its files have not changed between
two looks, so that one that is still being copied is left alone, and again when they have changed
later. One that cannot be loaded changes nothing for requests: the reason is logged once, and it is
tried again when its files change, or when another one has made room; at each look where the reason
may pass by itself, such as an error of the system. A subfolder whose name begins
with a dot is none: an adapter that is written there, and then renamed, comes as a whole.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from mixtral_jax.errors import UserError
from serving.access.file_version import Version, version_of
from serving.engine.adapters import NoRoom
from serving.errors import ServingError

LOOK_SECONDS = 1.0
"""Seconds from one look at the folder to the next."""
_END_SECONDS = 5.0  # a load that waits for requests to end is not waited for
_FILES = ("adapter_config.json", "adapter_model.safetensors")

logger = logging.getLogger(__name__)

_Versions = tuple[Version, ...]
# In the place of the versions of files that are to be read again whether or not they change.
_PASSING: _Versions = ()


class AdapterHost(Protocol):
    """Owner of the adapters that computes with them. Its methods may be called by any thread."""

    def load_adapter(self, name: str, folder: Path) -> None:
        """Loads an adapter under a name, in the place of an older one of this name.

        Raises UserError or ServingError if it cannot be used; the older one then stays.
        """

    def unload_adapter(self, name: str) -> None:
        """Refuses later requests for an adapter, and frees its memory when it has answered all."""

    def adapters(self) -> Mapping[str, str]:
        """Returns the digests of the loaded adapters by their names."""


class AdapterFolder:
    """Follows a folder of adapters.

    Args:
        folder: The folder.
        host: Loads them.
        check_name: Raises UserError for a name that none of these adapters may have.
        on_failure: Called whenever an adapter cannot be loaded.
    """

    def __init__(
        self,
        folder: Path,
        host: AdapterHost,
        check_name: Callable[[str], None],
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = folder
        self._host = host
        self._check_name = check_name
        self._on_failure = on_failure
        self._before: dict[str, _Versions] = {}  # at the last look
        self._loaded: dict[str, _Versions] = {}
        self._failed: dict[str, _Versions] = {}
        self._reasons: dict[str, str] = {}  # why, as it was logged
        self._is_missing = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="adapters", daemon=True)

    @property
    def num_failed(self) -> int:
        """The number of subfolders that cannot be loaded as they are now."""
        return len(self._failed)

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
            seen = self._versions()
        except OSError as error:
            if not self._is_missing:
                logger.error("adapters stay as they are: %s", error)
            self._is_missing = True
            return
        self._is_missing = False
        for name in self._loaded.keys() - seen.keys():
            self._unload(name)
        for name in self._failed.keys() - seen.keys():
            del self._failed[name], self._reasons[name]
        for name, versions in seen.items():
            is_new = versions not in (self._loaded.get(name), self._failed.get(name))
            if is_new and versions == self._before.get(name):
                self._load(name, versions)
        self._before = seen

    def _follow(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            try:
                self.look()
            except ServingError as error:  # the engine has ended, and so does the process
                logger.error("the folder of adapters is not followed any more: %s", error)
                return
            except Exception:  # a bug of ours, which must not end the thread
                logger.exception("the folder of adapters could not be looked at")

    def _versions(self) -> dict[str, _Versions]:
        """Returns the versions of the files of each subfolder that has them all, by its name."""
        seen = {}
        for folder in sorted(self._folder.iterdir()):
            versions = tuple(version_of(folder / file) for file in _FILES)
            if not folder.name.startswith(".") and all(versions):
                seen[folder.name] = versions
        return seen

    def _load(self, name: str, versions: _Versions) -> None:
        try:
            self._check_name(name)
            self._put(name)
        except (UserError, ServingError, OSError) as error:
            self._failed[name] = versions if isinstance(error, UserError) else _PASSING
            if self._reasons.get(name) != str(error):
                logger.error("the adapter '%s' is not loaded: %s", name[:100], error)
            self._reasons[name] = str(error)
            self._on_failure()
        else:
            logger.info("loaded the adapter '%s'", name)
            self._failed.pop(name, None)
            self._reasons.pop(name, None)
            self._loaded[name] = versions

    def _put(self, name: str) -> None:
        """Loads an adapter; where all room is taken, in that of the older one of this name.

        Requests for it are then refused until those that the older one answers have ended.
        """
        folder = self._folder / name
        try:
            self._host.load_adapter(name, folder)
        except NoRoom:
            if name not in self._loaded:
                raise
            self._unload(name)
            self._host.load_adapter(name, folder)

    def _unload(self, name: str) -> None:
        self._host.unload_adapter(name)
        logger.info("unloaded the adapter '%s'", name)
        del self._loaded[name]
        for failed in self._failed:  # there is room again
            self._failed[failed] = _PASSING
