"""Compilation: programs are kept between runs, kept for a model, and counted.

Compiling is most of a start. A server compiles before its first request and never after it.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from importlib.util import find_spec

import jax

from mixtral_jax.errors import ConfigError
from mixtral_jax.paths import cache_folder

# Schemes of object stores, and the packages by which etils, and so JAX, reaches them.
_STORES = {"gs": "gcsfs", "s3": "s3fs"}
_COMPILED = "/jax/core/compile/backend_compile_duration"


def keep_programs() -> None:
    """Turns on JAX's persistent compilation cache, for quick programs too: there are dozens.

    It is in $JAX_COMPILATION_CACHE_DIR, which may be in an object store (gs://, s3://), or else in
    the folder "xla" of the user's cache.

    Raises ConfigError if jax lacks the package that reaches the store.
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    scheme = given.partition("://")[0]
    if scheme in _STORES and find_spec(_STORES[scheme]) is None:
        raise ConfigError(
            f"JAX_COMPILATION_CACHE_DIR is {given}, which jax reaches by {_STORES[scheme]}: "
            f"pip install {_STORES[scheme]}, or name a folder of this machine"
        )
    if not given:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class CompiledPrograms:
    """Compiled programs of one model, by what fixed their shapes; a Transformer has one of these.

    They are no part of what the model is: any two of these objects are equal, so that models share
    what JAX compiles for them, and a copy of a model begins without any.

    Args:
        limit: number of entries; the one that was not asked for the longest is dropped.
    """

    def __init__(self, limit: int = 8) -> None:
        self._limit = limit
        self._kept = OrderedDict[Hashable, object]()

    def get(self, key: Hashable) -> object | None:
        """Returns what was kept under the key, or None."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, key: Hashable, programs: object) -> None:
        """Keeps programs under the key, in place of those that were there."""
        self._kept[key] = programs
        self._kept.move_to_end(key)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompiledPrograms)

    def __hash__(self) -> int:
        return hash(CompiledPrograms)

    def __repr__(self) -> str:
        return f"CompiledPrograms({len(self._kept)} kept)"

    def __reduce__(self) -> tuple[type["CompiledPrograms"], tuple[int]]:
        return CompiledPrograms, (self._limit,)


class CompilationCount:
    """Counts the programs that this process compiles, from its construction until `close`.

    A program that the persistent cache spares counts as well, because it was not ready.

    Args:
        apart: the beginning of the names of threads whose programs are not counted.
    """

    def __init__(self, apart: str | None = None) -> None:
        self.value = 0
        self._apart = apart
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def close(self) -> None:
        """Ends the count; `value` stays as it is."""
        jax.monitoring.unregister_event_duration_listener(self._note)

    def __enter__(self) -> "CompilationCount":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _note(self, event: str, duration_secs: float, **facts: str | int) -> None:
        if event != _COMPILED:
            return
        # JAX calls this in the thread that compiles.
        is_apart = self._apart and threading.current_thread().name.startswith(self._apart)
        self.value += not is_apart
