"""The file of named API keys, of which only digests are kept.

A key is 32 random characters with 128 bits of entropy, so one round of SHA-256 hides it: unlike
passwords, for which slow hashes are made, keys cannot be guessed one by one. The operator edits the
file with `mixtral-jax keys`.

The file is JSON: `{"keys": [...]}` with an entry for each name. An entry of version 0.1, which has
one digest and no role, expiry or limits, is still read; the next change writes the file anew.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

from serving.access.caller import ANONYMOUS, DEFAULT, GATEWAY, Caller, CallerLimits
from serving.access.errors import AccessError

Role = Literal["user", "operator"]
"""What a key may do: ask, or also drain servers and read the usage of all callers."""
MAX_DIGESTS = 2
"""Keys that one name may have at a time: the newest, and the one before it while clients change."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True)
class KeyDigest:
    """The digest of one key."""

    sha256: str
    """Of the key, 64 hexadecimal digits."""
    created: str
    """ISO 8601, UTC."""
    expires: str | None = None
    """ISO 8601, UTC: from then on the key opens nothing; None: it does not expire."""

    def __post_init__(self) -> None:
        if not (isinstance(self.sha256, str) and len(self.digest) == 32):
            raise ValueError("sha256 must be 64 hexadecimal digits")
        if not isinstance(self.created, str):
            raise ValueError("created must be a time in ISO 8601")
        if self.expires is not None and datetime.fromisoformat(self.expires).tzinfo is None:
            raise ValueError("expires must be a time in ISO 8601 with its zone, such as +00:00")

    @property
    def digest(self) -> bytes:
        """SHA-256 of the key, 32 bytes."""
        return bytes.fromhex(self.sha256)

    @property
    def expires_at(self) -> float | None:
        """Seconds since 1970 from which on the key opens nothing; None: never."""
        return None if self.expires is None else datetime.fromisoformat(self.expires).timestamp()

    def has_expired(self, now: float) -> bool:
        """Returns True if the key opens nothing at `now`, seconds since 1970."""
        return self.expires_at is not None and now >= self.expires_at


@dataclass(frozen=True)
class StoredKey:
    """A name in the file: its keys, its role and its limits."""

    name: str
    digests: tuple[KeyDigest, ...]
    """At least one and at most MAX_DIGESTS; the newest comes last."""
    role: Role = "user"
    limits: CallerLimits = CallerLimits()
    batch_only: bool = False
    """Its requests are of the batch class, whatever they ask for."""

    def __post_init__(self) -> None:
        if not may_name(self.name):
            raise ValueError(f"{self.name!r} cannot name a key")
        if not 1 <= len(self.digests) <= MAX_DIGESTS:
            raise ValueError(f"{self.name} has {len(self.digests)} digests, not 1 or {MAX_DIGESTS}")
        if self.role not in get_args(Role):
            raise ValueError(f"the role of {self.name} is none of {', '.join(get_args(Role))}")
        if not isinstance(self.batch_only, bool):
            raise ValueError(f"batch_only of {self.name} is neither true nor false")
        for field in fields(CallerLimits):
            limit = getattr(self.limits, field.name)
            if limit is not None and (type(limit) is not int or limit < 1):
                raise ValueError(f"{field.name} of {self.name} must be a whole number from 1")

    @property
    def caller(self) -> Caller:
        """The caller that these keys belong to."""
        return Caller(self.name, self.role == "operator", self.limits, not self.batch_only)

    @classmethod
    def of_entry(cls, entry: Any) -> "StoredKey":
        """Reads an entry of the file. Raises ValueError or TypeError for any other content."""
        values = dict(entry)
        if "digests" not in values:
            digest = KeyDigest(values.pop("sha256", None), values.pop("created", None))
            return cls(values.pop("name", None), (digest,), **values)
        values["digests"] = tuple(KeyDigest(**digest) for digest in values["digests"])
        values["limits"] = CallerLimits(**values.get("limits", {}))
        return cls(**values)


class KeyFile:
    """A JSON file of keys, which only its owner may read. Every change is atomic.

    Args:
        path: The file; its folder is made with it.
        clock: Returns seconds since 1970, like time.time.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock

    def read(self) -> list[StoredKey]:
        """Returns what the file holds; raises OSError, or AccessError for any other content."""
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o022:
                raise AccessError(f"{self.path}: others may write it; run chmod 600 on it")
            content = file.read()
        try:
            keys = [StoredKey.of_entry(entry) for entry in json.loads(content)["keys"]]
        except (ValueError, TypeError, KeyError) as error:
            raise AccessError(
                f"{self.path}: not a file of keys, which `mixtral-jax keys add` makes ({error})"
            ) from None
        if len({key.name for key in keys}) < len(keys):
            raise AccessError(f"{self.path}: not a file of keys, for a name stands in it twice")
        return keys

    def add(
        self,
        name: str,
        *,
        role: Role = "user",
        lifetime: timedelta | None = None,
        limits: CallerLimits = CallerLimits(),
        batch_only: bool = False,
    ) -> str:
        """Makes a key of that name and returns it; only its digest is kept.

        Args:
            name: The caller's name.
            role: What it may do.
            lifetime: Time after which the key opens nothing; None: it does not expire.
            limits: The caller's own limits.
            batch_only: Put its requests into the batch class.

        Raises AccessError for a name that is taken or malformed, or a lifetime without end.
        """
        if not may_name(name):
            raise AccessError(
                f"{name!r} cannot name a key: give up to 64 letters, digits and . _ @ -, but not "
                f"{DEFAULT}, {GATEWAY} or {ANONYMOUS}"
            )
        key, digest = self._make(lifetime)
        with self._changing() as keys:
            if any(known.name == name for known in keys):
                raise AccessError(
                    f"{self.path} has a key {name!r}; rotate or remove it, or add another"
                )
            keys.append(StoredKey(name, (digest,), role, limits, batch_only))
        return key

    def rotate(
        self, name: str, *, overlap: timedelta | None = None, lifetime: timedelta | None = None
    ) -> str:
        """Makes a second key of a name and returns it; role, limits and usage stay the name's.

        Args:
            name: The caller's name.
            overlap: Time for which the older key stays valid; None: until it is removed or expires.
            lifetime: Time after which the new key opens nothing; None: as long as the older key's.

        Raises AccessError if there is no such name, or if it has two valid keys.
        """
        now = self._clock()
        with self._changing() as keys:
            place = self._place(keys, name)
            valid = [digest for digest in keys[place].digests if not digest.has_expired(now)]
            if len(valid) >= MAX_DIGESTS:
                raise AccessError(
                    f"{name!r} has two valid keys; `mixtral-jax keys remove {name} --old` takes "
                    "the older one away"
                )
            if overlap is not None:
                until = now + overlap.total_seconds()
                valid = [
                    digest
                    if digest.expires_at is not None and digest.expires_at <= until
                    else replace(digest, expires=_time(until))
                    for digest in valid
                ]
            key, digest = self._make(lifetime or _lifetime(keys[place].digests[-1]))
            keys[place] = replace(keys[place], digests=(*valid, digest))
        return key

    def remove(self, name: str) -> None:
        """Takes a name and its keys away; raises AccessError if there is none of that name."""
        with self._changing() as keys:
            del keys[self._place(keys, name)]

    def remove_old(self, name: str) -> None:
        """Takes the older of a name's two keys away; raises AccessError if there are not two."""
        with self._changing() as keys:
            place = self._place(keys, name)
            if len(keys[place].digests) == 1:
                raise AccessError(f"{name!r} has one key only; without --old it is removed")
            keys[place] = replace(keys[place], digests=keys[place].digests[-1:])

    def _place(self, keys: list[StoredKey], name: str) -> int:
        for place, key in enumerate(keys):
            if key.name == name:
                return place
        known = ", ".join(key.name for key in keys) or "none"
        raise AccessError(f"{self.path} has no key {name!r}; its keys: {known}")

    def _make(self, lifetime: timedelta | None) -> tuple[str, KeyDigest]:
        """Returns a new key and its digest. Raises AccessError for a lifetime without end."""
        key, now = secrets.token_hex(16), self._clock()
        expires = None if lifetime is None else _time(now + lifetime.total_seconds())
        return key, KeyDigest(digest_of(key).hex(), _time(now), expires)

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
        text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=2)
        write_private(path, f"{text}\n")


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner may read, at once or not at all. Raises OSError."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:  # mkstemp's mode is 0600
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def digest_of(key: str) -> bytes:
    """Returns the SHA-256 of a key, 32 bytes."""
    return hashlib.sha256(key.encode()).digest()


def may_name(name: str) -> bool:
    """Returns True for a name that a key of the file may have."""
    return bool(_NAME.fullmatch(name)) and name not in (DEFAULT, GATEWAY, ANONYMOUS)


def _time(seconds: float) -> str:
    """Returns seconds since 1970 in ISO 8601. Raises AccessError beyond the year 9999."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError):
        raise AccessError("the time given for a key ends after the year 9999") from None


def _lifetime(digest: KeyDigest) -> timedelta | None:
    if digest.expires is None:
        return None
    return datetime.fromisoformat(digest.expires) - datetime.fromisoformat(digest.created)
