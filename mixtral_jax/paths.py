"""Folders of the user's own files: caches, settings and state, where the platform keeps such files.

On Linux these are the folders of the XDG base directory specification. Each function reads the
environment when it is called, and makes no folder.
"""

import os
from pathlib import Path

import platformdirs

_NAME = "mixtral-jax"


def cache_folder() -> Path:
    """Returns the folder of fetched weights and compiled programs, which may be deleted.

    It is $MIXTRAL_JAX_CACHE, else such as ~/.cache/mixtral-jax.
    """
    if own := os.environ.get("MIXTRAL_JAX_CACHE"):
        return Path(own)
    return platformdirs.user_cache_path(_NAME, appauthor=False)


def settings_folder() -> Path:
    """Returns the folder of settings, such as ~/.config/mixtral-jax."""
    return platformdirs.user_config_path(_NAME, appauthor=False)


def state_folder() -> Path:
    """Returns the folder of what servers write, such as ~/.local/state/mixtral-jax."""
    return platformdirs.user_state_path(_NAME, appauthor=False)
