"""The key of groups whose processes are all of one user on one machine, made at the first start."""

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

import platformdirs

from serving.cluster.rank import RankError


def default_key_file() -> Path:
    """Returns the file of the key in the user's folder for state."""
    return platformdirs.user_state_path("mixtral-jax", appauthor=False) / "group.key"


def local_key(file: Path) -> str:
    """Returns the key in the file, which is made, with its folder, if it is not there.

    Processes that start at the same time get the same key.

    Raises RankError if the file cannot be made or others may read it.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return _read(file)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as made:  # mkstemp's mode is 0600
                made.write(secrets.token_hex(16))
            with suppress(FileExistsError):  # another process was faster
                os.link(temporary, file)
        finally:
            os.unlink(temporary)
        return _read(file)
    except OSError as error:
        raise RankError(
            f"the key of the group cannot be kept in {file}: {error.strerror}; set "
            "MIXTRAL_JAX_GROUP_KEY to the same key in all processes"
        ) from None


def _read(file: Path) -> str:
    with file.open(encoding="utf-8") as opened:
        status = os.fstat(opened.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise RankError(f"{file}: others may read it; run chmod 600 on it, or remove it")
        return opened.read().strip()
