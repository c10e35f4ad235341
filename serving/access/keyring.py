"""Named API keys, of which only digests are kept.

A key is 32 random characters with 128 bits of entropy, so one round of SHA-256 hides it: unlike
passwords, for which slow hashes are made, keys cannot be guessed one by one. `KeyFile` is the JSON
file that the operator edits with `mixtral-jax keys`. `Keyring` looks keys up for a server, and
reads the file again whenever it changes.
"""

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from serving.access.errors import AccessError

# Callers that are not in a file. Log lines and accounts have these names too.
DEFAULT, GATEWAY, ANONYMOUS = "default", "gateway", "anonymous"
# The file is checked for changes at most this often, and only when a key is looked up.
RELOAD_SECONDS = 1.0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredKey:
    """An entry of the file."""

    name: str
    sha256: str  # hexadecimal
    created: str  # ISO 8601, UTC

    @property
    def digest(self) -> bytes:
        """SHA-256 of the key, 32 bytes."""
        return bytes.fromhex(self.sha256)


class KeyFile:
    """A JSON file of keys, which only its owner may read. Every change is atomic."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[StoredKey]:
        """Returns what the file holds; raises OSError, or AccessError for any other content."""
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o022:
                raise AccessError(f"{self.path}: others may write it; run chmod 600 on it")
            content = file.read()
        try:
            keys = [StoredKey(**entry) for entry in json.loads(content)["keys"]]
            if all(_may_name(key.name) and len(key.digest) == 32 for key in keys):
                return keys
        except (ValueError, TypeError, KeyError):
            pass
        raise AccessError(f"{self.path}: not a file of keys; `mixtral-jax keys add` makes one")

    def add(self, name: str) -> str:
        """Makes a key of that name and returns it; only its digest is kept.

        Raises AccessError for a name that is taken or malformed.
        """
        if not _may_name(name):
            raise AccessError(
                f"{name!r} cannot name a key: give up to 64 letters, digits and . _ @ -, but not "
                f"{DEFAULT}, {GATEWAY} or {ANONYMOUS}"
            )
        key = secrets.token_hex(16)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        with self._changing() as keys:
            if any(known.name == name for known in keys):
                raise AccessError(
                    f"{self.path} has a key {name!r}; remove it first, or add another"
                )
            keys.append(StoredKey(name, _digest(key).hex(), created))
        return key

    def remove(self, name: str) -> None:
        """Takes a key away; raises AccessError if there is none of that name."""
        with self._changing() as keys:
            others = [key for key in keys if key.name != name]
            if len(others) == len(keys):
                known = ", ".join(key.name for key in keys) or "none"
                raise AccessError(f"{self.path} has no key {name!r}; its keys: {known}")
            keys[:] = others

    @contextmanager
    def _changing(self) -> Iterator[list[StoredKey]]:
        """Yields the keys, to be changed in place; writes them unless the block raises."""
        folder = self.path.resolve().parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)  # the file itself is replaced and cannot be locked
            try:
                keys = self.read()
            except FileNotFoundError:
                keys = []
            yield keys
            self._write(keys)
        finally:
            os.close(held)

    def _write(self, keys: list[StoredKey]) -> None:
        path = self.path.resolve()  # a symbolic link stays one
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w") as file:  # mkstemp's mode is 0600
                json.dump({"keys": [asdict(key) for key in keys]}, file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


class Keyring:
    """Keys and the callers that they belong to.

    Args:
        fixed: Keys that are valid as long as the process runs, by the names of their callers.
            Raises AccessError for a key that no header could carry.
        file: More keys, read now and whenever the file changes. Raises OSError or AccessError if
            it cannot be read now. If it cannot be read later, the keys read last stay valid.
        clock: Time in seconds that never goes back.
    """

    def __init__(
        self,
        fixed: Mapping[str, str],
        file: KeyFile | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for key in fixed.values():
            check_key(key)
        self._fixed = [(_digest(key), name) for name, key in fixed.items()]
        self._file = file
        self._clock = clock
        self._stored: list[tuple[bytes, str]] = []
        self._seen: tuple[int, ...] | None = None
        self._looked = clock()
        if file is not None:
            self._seen = _version(file.path)
            self._load(file)

    def find(self, presented: str) -> str | None:
        """Returns the name of the caller that has this key, or None."""
        self._follow_file()
        digest = _digest(presented)
        caller = None
        # Every digest is compared, also after a match, so that the time tells nothing about them.
        for known, name in (*self._fixed, *self._stored):
            if hmac.compare_digest(digest, known) and caller is None:
                caller = name
        return caller

    def _follow_file(self) -> None:
        now = self._clock()
        if self._file is None or now - self._looked < RELOAD_SECONDS:
            return
        self._looked = now
        seen = _version(self._file.path)
        if seen == self._seen:
            return
        # The version is noted before the file is read: a later write is a new version.
        self._seen = seen
        try:
            self._load(self._file)
        except (OSError, ValueError) as error:
            logger.error("keys were not read again, those known before stay: %s", error)
        else:
            logger.info("%s: %d keys", self._file.path, len(self._stored))

    def _load(self, file: KeyFile) -> None:
        self._stored = [(key.digest, key.name) for key in file.read()]


def check_key(key: str, source: str = "the key") -> None:
    """Raises AccessError for a key that no header could carry; `source` says where it stands."""
    # A header's value is visible ASCII; with a space inside, the scheme could not be told.
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        raise AccessError(
            f"{source} cannot be used: a key must be visible ASCII characters without spaces"
        )


def _may_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name not in (DEFAULT, GATEWAY, ANONYMOUS)


def _version(path: Path) -> tuple[int, ...] | None:
    """Returns numbers that change whenever the file is written; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
