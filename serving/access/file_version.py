"""Versions of the files that a server follows while it runs."""

from pathlib import Path

Version = tuple[int, ...] | None


def version_of(path: Path) -> Version:
    """Returns numbers that change whenever the file is written; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
