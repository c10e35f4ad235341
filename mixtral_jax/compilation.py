"""Compiled programs are kept between runs: compiling is most of a start."""

import os
from pathlib import Path

import jax


def keep_programs() -> None:
    """Turns on JAX's persistent compilation cache, where JAX_COMPILATION_CACHE_DIR says or in
    $MIXTRAL_JAX_CACHE/xla, else xla under mixtral-jax in the user's cache folder."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    own = Path(os.environ.get("MIXTRAL_JAX_CACHE") or home / "mixtral-jax")
    jax.config.update("jax_compilation_cache_dir", str(own / "xla"))
