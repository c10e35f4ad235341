"""Compiled programs are kept between runs: compiling is most of a start. And counted: a server
compiles before its first request, never after."""

import os
from pathlib import Path

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


def keep_programs() -> None:
    """Turns on JAX's persistent compilation cache, where JAX_COMPILATION_CACHE_DIR says, else in
    `compiled_folder("xla")`."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(compiled_folder("xla")))


def compiled_folder(kind: str) -> Path:
    """Where what was compiled is kept: under $MIXTRAL_JAX_CACHE, else the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MIXTRAL_JAX_CACHE") or home / "mixtral-jax") / kind


class CompilationCount:
    """Counts what this process compiles from now on, for as long as it lives.

    A program that the persistent cache spares counts as well: it was not ready.
    """

    def __init__(self) -> None:
        self.value = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **facts: str | int) -> None:
        self.value += event == _COMPILED
