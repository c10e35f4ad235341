"""Checkpoint folders: what stands in one, and how one is published whole.

    FOLDER/
        config.json        {"format": "mixtral-jax/1", "name": ..., "provider": ..., "dtype": ...,
                            "model": ModelConfig}; of a model some of whose weights have another
                            dtype, "weight_dtypes": {"layers.0.attention.v": "int8"}
        params/            Orbax; one array per parameter, nested by the dots of its name
        tokenizer.*        the files that `mixtral_jax.tokenization.tokenizer.load` reads

A checkpoint is written under another name and renamed at the end, so a folder that has its name is
complete.
"""

import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mixtral_jax.checkpoint.store import is_remote, uploaded_to
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError, UserError
from mixtral_jax.placement import WeightDtypes, checked_weight_dtypes

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
FORMAT = "mixtral-jax/1"
_DAY_S = 86_400


@dataclass(frozen=True, kw_only=True)
class Card:
    """The content of a checkpoint's `config.json`: its model, dtype, name and provider."""

    model: ModelConfig
    dtype: str
    name: str
    provider: str
    weight_dtypes: WeightDtypes = ()  # of single weights, where they differ from `dtype`

    def write(self, folder: Path) -> None:
        """Writes `config.json` into an existing folder."""
        content = {
            "format": FORMAT,
            "name": self.name,
            "provider": self.provider,
            "dtype": self.dtype,
            **({"weight_dtypes": dict(self.weight_dtypes)} if self.weight_dtypes else {}),
            "model": self.model.to_json(),
        }
        text = json.dumps(content, indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Card":
        """Reads `config.json`. Raises ConfigError if the folder is not a checkpoint of ours."""
        if not is_checkpoint(folder):
            hint = (
                f"convert it first: mixtral-jax convert {folder} DST"
                if (folder / CONFIG_FILE).exists()
                else "give the folder that `mixtral-jax convert SRC DST` made"
            )
            raise ConfigError(f"{folder} is not a mixtral-jax checkpoint; {hint}")
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        try:
            card = cls(
                model=ModelConfig.from_json(content["model"]),
                dtype=content["dtype"],
                name=content["name"],
                provider=content["provider"],
            )
            given = content.get("weight_dtypes", {})
            dtypes = checked_weight_dtypes(card.model, card.dtype, given)
            return replace(card, weight_dtypes=dtypes)
        except KeyError as missing:
            raise ConfigError(
                f"{folder / CONFIG_FILE} lacks {missing}; convert the model anew"
            ) from None


def is_checkpoint(folder: Path) -> bool:
    """Returns true if a folder is a checkpoint of ours, by its `config.json`."""
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


@contextmanager
def finished_at(folder: Path | str) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `folder` when the block ends without an error.

    The URL of a folder in an object store is written to when the block has ended, its config last;
    until then all of it is in a temporary folder of this machine.

    Each call has a working folder of its own beside `folder`, so several processes may write to
    one destination: the first to finish gets the name, the others fail. Working folders that
    killed processes left behind are removed first.

    Raises:
        FileExistsError: `folder` exists and is not empty, at the beginning or at the end.
        UserError: `folder` is a mount point, which a rename cannot replace.
    """
    if is_remote(folder):
        with uploaded_to(str(folder), last=(CONFIG_FILE, ADAPTER_CONFIG_FILE)) as partial:
            yield partial
        return
    # The working folder must be on the file system of the folder that a link points to.
    folder = Path(os.path.realpath(folder))
    _check_is_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    work, lock = _working_folder(folder)
    try:
        # mkdtemp makes its folder private; this inner one gets the user's usual permissions.
        partial = work / folder.name
        partial.mkdir()
        _check_is_replaceable(folder, partial)
        yield partial
        _sync(partial)
        _rename(partial, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _check_is_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; remove it or choose another")


def _check_is_replaceable(folder: Path, partial: Path) -> None:
    """Replaces an empty `folder` by the empty `partial`, as a trial of the rename at the end."""
    if folder.exists():
        _rename(partial, folder)
        partial.mkdir()


def _working_folder(folder: Path) -> tuple[Path, int]:
    """Makes a folder beside `folder`, and locks it for as long as the descriptor is open."""
    while True:
        name = tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent)
        work = Path(name)
        try:
            lock = os.open(work, os.O_RDONLY)
        except FileNotFoundError:
            continue
        # Another process may take the new folder for abandoned before it is locked.
        if _lock(lock) is not False and work.exists():
            return work, lock
        os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    """Removes the working folders of processes that were killed."""
    for work in folder.parent.glob(f".{glob.escape(folder.name)}.*partial"):
        try:
            lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            is_locked = _lock(lock)
            is_old = time.time() - os.fstat(lock).st_mtime > _DAY_S
            if is_locked or (is_locked is None and is_old):
                shutil.rmtree(work, ignore_errors=True)
        finally:
            os.close(lock)


def _lock(descriptor: int) -> bool | None:
    """Locks a file or folder; False if another holds the lock, None if no lock can be had there.

    The lock ends with the process that holds it, however it ends.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        return None
    return True


def _sync(folder: Path) -> None:
    """Waits until the content of all files is on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as written:
                os.fsync(written.fileno())


def _rename(partial: Path, folder: Path) -> None:
    """Renames a folder onto one that is empty or absent. Raises as `finished_at` describes."""
    try:
        os.rename(partial, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(
                f"{folder} was written by another process meanwhile; use that, or choose another"
            ) from error
        if error.errno in (errno.EBUSY, errno.EXDEV):
            raise UserError(
                f"{folder} is a mount point, which cannot be replaced by a finished folder; name "
                f"a folder in it, such as {folder / 'model'}"
            ) from error
        raise
