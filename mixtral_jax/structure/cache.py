"""FormCache: forms and refusals that were made before, bounded by bytes, apart for each caller."""

from collections import OrderedDict
from threading import Lock
from typing import Generic, TypeVar

Value = TypeVar("Value")


class FormCache(Generic[Value]):
    """Store of what was made for each caller, the least recently used forgotten first. Thread-safe.

    A caller finds only what it asked for itself. When the bytes are used up, the caller that holds
    the most of them loses its oldest entry, so that nobody can push out what others hold, nor see
    by its own losses what they do.

    Args:
        max_bytes: of all entries; an entry that is larger alone is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = Lock()
        self._entries: dict[bytes, OrderedDict[bytes, tuple[Value, int]]] = {}
        self._bytes: dict[bytes, int] = {}

    @property
    def size(self) -> int:
        """Bytes of all entries."""
        with self._lock:
            return sum(self._bytes.values())

    def get(self, salt: bytes, key: bytes) -> Value | None:
        """Returns what a caller's key has, or None."""
        with self._lock:
            entries = self._entries.get(salt)
            if entries is None or key not in entries:
                return None
            entries.move_to_end(key)
            return entries[key][0]

    def put(self, salt: bytes, key: bytes, value: Value, size: int) -> None:
        """Keeps `value`, of `size` bytes, for a caller's key."""
        with self._lock:
            self._forget(salt, key)
            if size > self.max_bytes:
                return
            self._entries.setdefault(salt, OrderedDict())[key] = (value, size)
            self._bytes[salt] = self._bytes.get(salt, 0) + size
            while sum(self._bytes.values()) > self.max_bytes:
                largest = max(self._bytes, key=self._bytes.__getitem__)
                self._forget(largest, next(iter(self._entries[largest])))

    def _forget(self, salt: bytes, key: bytes) -> None:
        entries = self._entries.get(salt)
        if entries is None or key not in entries:
            return
        _, size = entries.pop(key)
        self._bytes[salt] -= size
        if not entries:
            del self._entries[salt], self._bytes[salt]
