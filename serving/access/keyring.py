"""The keys that a server lets in: those of its environment, and those of a file that it follows."""

import hmac
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serving.access.caller import DEFAULT, GATEWAY, Caller
from serving.access.errors import AccessError
from serving.access.file_version import Version, version_of
from serving.access.key_file import KeyFile, digest_of
from serving.errors import Unauthenticated

# The file is checked for changes at most this often, and only when a key is looked up.
RELOAD_SECONDS = 1.0
SHORTEST_KEY = 16
"""Characters that a key of the environment has at least: `openssl rand -hex 16` makes 32."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    """A digest that opens, its caller, and when it ends (seconds since 1970; None: never)."""

    digest: bytes
    caller: Caller
    expires_at: float | None = None


class Keyring:
    """Keys and the callers that they belong to.

    Args:
        fixed: Keys that are valid as long as the process runs, by the names of their callers. Those
            of "default" and "gateway" are an operator's. Raises AccessError for a key that no
            header could carry.
        file: More keys, read now and whenever the file changes. Raises OSError or AccessError if
            it cannot be read now. If it cannot be read later, the keys read last stay valid.
        clock: Time in seconds that never goes back.
        calendar: Seconds since 1970, like time.time, by which keys expire.
    """

    def __init__(
        self,
        fixed: Mapping[str, str],
        file: KeyFile | None = None,
        clock: Callable[[], float] = time.monotonic,
        calendar: Callable[[], float] = time.time,
    ) -> None:
        for key in fixed.values():
            _check_form(key, "the key")
        self._fixed = [
            _Entry(digest_of(key), Caller(name, is_operator=name in (DEFAULT, GATEWAY)))
            for name, key in fixed.items()
        ]
        self._file = file
        self._clock = clock
        self._calendar = calendar
        self._stored: list[_Entry] = []
        self._seen: Version = None
        self._looked = clock()
        self._must_retry = False
        self._reload_error: str | None = None
        if file is not None:
            self._seen = version_of(file.path)
            self._load(file)

    @property
    def reload_failed(self) -> bool:
        """True while the keys of an older state of the file are in use, as it cannot be read."""
        return self._reload_error is not None

    def find(self, presented: str) -> Caller | None:
        """Returns the caller that has this key, or None.

        Raises Unauthenticated for a key that was valid and has expired.
        """
        self._follow_file()
        digest, now = digest_of(presented), self._calendar()
        caller, has_expired = None, False
        # Every digest is compared, also after a match, so that the time tells nothing about them.
        for entry in (*self._fixed, *self._stored):
            if hmac.compare_digest(digest, entry.digest) and caller is None:
                if entry.expires_at is None or now < entry.expires_at:
                    caller = entry.caller
                else:
                    has_expired = True
        if caller is None and has_expired:
            raise Unauthenticated(
                "auth token validation failed: this key has expired; ask the operator of this "
                "endpoint for a new one"
            )
        return caller

    def _follow_file(self) -> None:
        now = self._clock()
        if self._file is None or now - self._looked < RELOAD_SECONDS:
            return
        self._looked = now
        seen = version_of(self._file.path)
        if seen == self._seen and not self._must_retry:
            return
        # The version is noted before the file is read: a later write is a new version.
        self._seen = seen
        try:
            self._load(self._file)
        except (OSError, ValueError) as error:
            # An error of the system may pass by itself, and until then a removed key opens.
            self._must_retry = isinstance(error, OSError)
            if str(error) != self._reload_error:
                logger.error("keys were not read again, those known before stay: %s", error)
            self._reload_error = str(error)
        else:
            self._must_retry, self._reload_error = False, None
            logger.info("%s: %s", self._file.path, self._summary())

    def _load(self, file: KeyFile) -> None:
        self._stored = [
            _Entry(digest.digest, key.caller, digest.expires_at)
            for key in file.read()
            for digest in key.digests
        ]

    def _summary(self) -> str:
        now = self._calendar()
        operators = sum(entry.caller.is_operator for entry in self._stored)
        expired = sum(e.expires_at is not None and now >= e.expires_at for e in self._stored)
        return f"{len(self._stored)} keys, {operators} of operators, {expired} expired"


def check_key(key: str, source: str) -> None:
    """Checks a key that stands in `source`, such as an environment variable.

    Raises AccessError for a key that no header could carry, or that can be guessed.
    """
    _check_form(key, source)
    if len(key) < SHORTEST_KEY:
        raise AccessError(
            f"{source} cannot be used: a key of {len(key)} characters can be guessed; give at "
            f"least {SHORTEST_KEY}, such as `openssl rand -hex 16` prints"
        )


def _check_form(key: str, source: str) -> None:
    # A header's value is visible ASCII; with a space inside, the scheme could not be told.
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        raise AccessError(
            f"{source} cannot be used: a key must be visible ASCII characters without spaces"
        )
