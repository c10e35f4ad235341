"""Compiled programs are kept between runs: compiling is most of a start. And counted: a server
compiles before its first request, never after."""

import os
from pathlib import Path

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


def keep_programs() -> None:
    """Turns on JAX's persistent compilation cache, where JAX_COMPILATION_CACHE_DIR says or in
    $MIXTRAL_JAX_CACHE/xla, else xla under mixtral-jax in the user's cache folder."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    own = Path(os.environ.get("MIXTRAL_JAX_CACHE") or home / "mixtral-jax")
    jax.config.update("jax_compilation_cache_dir", str(own / "xla"))


class CompilationCount:
    """Counts what this process compiles from now on, for as long as it lives.

    A program that the persistent cache spares counts as well: it was not ready.
    """

    def __init__(self) -> None:
        self.value = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **facts: str | int) -> None:
        self.value += event == _COMPILED
