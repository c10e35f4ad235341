"""The files of an adapter's subfolder at one moment: whether they are at rest, and are its own.

An adapter is a pair of files, which come one after the other. Whoever copies them may do so under
other names first, as rsync does, so that all files of the subfolder have to be at rest.
"""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mixtral_jax.errors import AdapterError

FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Names of the two files."""
_MOST_FILES = 1_000  # of a subfolder, that are looked at

Version = tuple[int, ...] | None
"""Numbers that change whenever a file is written; None if there is no file."""


class Pair(NamedTuple):
    """Versions of the two files of an adapter."""

    config: Version
    weights: Version

    @classmethod
    def of(cls, folder: Path) -> "Pair":
        """Looks at a subfolder, or at what is no folder and has no files.

        Raises OSError where that is refused, or fails.
        """
        return cls(*(_version(folder / name) for name in FILES))

    @property
    def is_missing(self) -> bool:
        """True if there is neither file, and so no adapter."""
        return self == (None, None)

    def is_odd(self, loaded: "Pair | None") -> bool:
        """Returns True if a file is absent, or is the one that was loaded while the other is not.

        Its other half may still be to come.
        """
        if None in self:
            return True
        return loaded is not None and sum(a != b for a, b in zip(self, loaded, strict=True)) == 1


def other_files(folder: Path) -> tuple[tuple[str, Version], ...]:
    """Returns the versions of all else in a subfolder by its name, such as a copy under way.

    Raises OSError as `Pair.of` does.
    """

    def entries() -> Iterator[tuple[str, Version]]:
        with os.scandir(folder) as scanned:
            for entry in islice(scanned, _MOST_FILES):
                if entry.name not in FILES:
                    yield entry.name, _version(folder / entry.name)

    return tuple(sorted(entries()))


def check_links(folder: Path, root: Path) -> None:
    """Raises AdapterError where a link leads from an adapter's subfolder out of the watched folder.

    Else whoever may write into that would have the server read any file that it can.
    """
    inside = os.path.realpath(root)
    for name in FILES:
        target = os.path.realpath(folder / name)
        if os.path.commonpath([inside, target]) != inside:
            raise AdapterError(
                f"{folder / name} is a link out of {root}, to {target}; copy the adapter into "
                "the folder, or name it by --adapter"
            )


def _version(path: Path) -> Version:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
