"""Output: the folder of a run, which one run uses at a time, and what goes wrong with its disk."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mixtral_jax.errors import ConfigError, UserError

ADAPTER, MODEL, CHECKPOINTS = "adapter", "model", "checkpoints"

_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
_DISK_TEXTS = ("no space left", "disk quota exceeded", "file too large", "read-only file system")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder of a run, and keeps other runs out of it until the block ends.

    Raises ConfigError where another run uses it now, and UserError where it cannot be written. The
    claim ends with the process, however it ends; a file system without locks has none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; give another --output"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another run uses {folder} now; wait for its end, or give another --output"
            ) from None
        except OSError:
            pass
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # if nothing was written, such as for rows that were refused
        os.close(descriptor)


def last_saved(folder: Path) -> int:
    """Returns the steps of the last whole checkpoint of a run; 0 where there is none."""
    checkpoints = folder / CHECKPOINTS
    if not checkpoints.is_dir():
        return 0
    return max((int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()), default=0)


def check_result(folder: Path, result: Path, steps: int) -> None:
    """Raises ConfigError for a result that cannot be of the run in this folder."""
    saved = last_saved(folder)
    if result.exists() and saved < steps:
        raise ConfigError(
            f"{result} is there already, of a run that has ended, and {folder} is at step {saved} "
            f"of {steps}; give the settings of that run, move it away, or give another --output"
        )


def resumption(folder: Path) -> str:
    """Returns where the run in a folder can go on, as a line."""
    saved = last_saved(folder)
    if not saved:
        return "stopped; nothing is saved yet, and the same command begins anew"
    return (
        f"stopped; step {saved} is saved in {folder / CHECKPOINTS}: run the same command to go on"
    )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns errors of a disk that is full or read-only into a UserError that says what is saved."""
    # Orbax's threads log each error with its traceback, and raise it as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        saved = last_saved(folder)
        rest = f": the same command goes on from step {saved} then" if saved else ""
        raise UserError(f"the run in {folder} cannot write: {reason}; make room{rest}") from error


def _disk_reason(error: BaseException | None) -> str | None:
    """Returns the reason that an error, or one behind it, has in a disk; None if it has none.

    Orbax gives the system's reason in the text of errors of other classes.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            place = f" ({error.filename})" if error.filename else ""
            return f"{error.strerror}{place}"
        text = str(error).lower()
        for reason in _DISK_TEXTS:
            if reason in text:
                return reason
        error = error.__cause__ or error.__context__
    return None
