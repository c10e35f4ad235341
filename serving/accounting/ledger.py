"""The ledger of what callers have used, by day (UTC): counted in memory, kept in SQLite.

What was used of an adapter is counted in the caller's day, and once more under the adapter's name.

No request waits for the disk: `add` counts in memory, and a thread writes what is new twice a
second. A process that is killed loses at most a second. Several processes of one machine may share
a file, because each adds to the sums that are there; a file system of the network will not do.
"""

import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import platformdirs

from serving.errors import SetupError, Unavailable

IN_MEMORY = ":memory:"  # SQLite's name for no file
_WRITE_SECONDS = 0.5
_LOCK_SECONDS = 5.0  # the longest wait for another process that has locked the file
_VERSION = 2
_TABLE = """
    CREATE TABLE IF NOT EXISTS usage (
        caller TEXT NOT NULL,
        day TEXT NOT NULL,
        requests INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (caller, day)
    ) WITHOUT ROWID
"""
# Beside the other one, to which a process of an older version may still write.
_ADAPTER_TABLE = """
    CREATE TABLE IF NOT EXISTS adapter_usage (
        caller TEXT NOT NULL,
        day TEXT NOT NULL,
        adapter TEXT NOT NULL,
        requests INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        PRIMARY KEY (caller, day, adapter)
    ) WITHOUT ROWID
"""
_COLUMNS = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens")
_ADD_CACHED = "ALTER TABLE usage ADD COLUMN cached_tokens INTEGER NOT NULL DEFAULT 0"
_ADD = """
    INSERT INTO usage (caller, day, requests, prompt_tokens, completion_tokens, cached_tokens)
    VALUES (?, ?, ?, ?, ?, ?)
    ON CONFLICT (caller, day) DO UPDATE SET
        requests = requests + excluded.requests,
        prompt_tokens = prompt_tokens + excluded.prompt_tokens,
        completion_tokens = completion_tokens + excluded.completion_tokens,
        cached_tokens = cached_tokens + excluded.cached_tokens
"""
_ADD_OF_ADAPTER = """
    INSERT INTO adapter_usage
    (caller, day, adapter, requests, prompt_tokens, completion_tokens, cached_tokens)
    VALUES (?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (caller, day, adapter) DO UPDATE SET
        requests = requests + excluded.requests,
        prompt_tokens = prompt_tokens + excluded.prompt_tokens,
        completion_tokens = completion_tokens + excluded.completion_tokens,
        cached_tokens = cached_tokens + excluded.cached_tokens
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Usage:
    """The use of one caller on one day: answered requests, and their tokens.

    Attributes:
        caller: The caller's name.
        day: In UTC, such as 2026-11-22.
        requests: Requests that were answered, also those answered in part.
        prompt_tokens: Tokens of their rendered prompts, as far as they were computed.
        completion_tokens: Tokens generated.
        cached_tokens: Those of the prompts' tokens that earlier prompts had computed.
        adapter: The adapter that this part of the day's use was of; empty for the whole day.
    """

    caller: str
    day: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    adapter: str = ""


def default_ledger_file() -> str:
    """Returns a file in the user's folder for state, or IN_MEMORY if that cannot be written."""
    file = platformdirs.user_state_path("mixtral-jax", appauthor=False) / "usage.db"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return IN_MEMORY
    return str(file) if os.access(file.parent, os.W_OK) else IN_MEMORY


class UsageLedger:
    """Adds up the use of each caller and day. Thread-safe.

    Args:
        file: A database, made with its folder if it is not there; or IN_MEMORY, which is lost with
            the process.
        clock: Returns seconds since 1970, like time.time.

    Raises:
        SetupError: The file cannot be used.
    """

    def __init__(
        self, file: str | Path = IN_MEMORY, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        # (caller, day, adapter, column): an empty adapter stands for the whole day.
        self._new: Counter[tuple[str, str, str, str]] = Counter()
        self._counting = threading.Lock()  # never held while the disk is waited for
        self._writing = threading.Lock()
        self._is_behind = False  # the last write failed
        self._database = _open(file)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="usage", daemon=True)
        self._thread.start()

    def add(
        self,
        caller: str,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int = 0,
        adapter: str = "",
    ) -> None:
        """Counts one request and its tokens on the current day; `adapter` is what has answered."""
        day = datetime.fromtimestamp(self._clock(), UTC).date().isoformat()
        counts = (1, prompt_tokens, completion_tokens, cached_tokens)
        with self._counting:
            for name in {"", adapter}:
                for column, count in zip(_COLUMNS, counts, strict=True):
                    self._new[caller, day, name, column] += count

    def report(self, caller: str | None = None) -> list[Usage]:
        """Returns all use so far by caller and day, of one caller or of all; waits for the disk.

        Behind the whole of a day stand the parts of it that were of adapters, by their names.

        Raises Unavailable if the file cannot be read now, such as while another process locks it.
        """
        where = "" if caller is None else " WHERE caller = ?"
        with self._writing:
            self._write()
            try:
                values = ", ".join(_COLUMNS)
                rows = self._database.execute(
                    f"SELECT caller, day, {values}, '' AS adapter FROM usage{where} UNION ALL "
                    f"SELECT caller, day, {values}, adapter FROM adapter_usage{where} "
                    "ORDER BY caller, day, adapter",
                    () if caller is None else (caller, caller),
                ).fetchall()
            except sqlite3.Error as error:
                logger.error("usage cannot be read: %s", error)
                raise Unavailable("usage cannot be read now; try again shortly") from error
        return [Usage(*row) for row in rows]

    def close(self) -> None:
        """Writes what is new, and ends the thread; nothing may be added afterwards."""
        self._end.set()
        self._thread.join()
        with self._writing:
            self._write()
            self._database.close()

    def _write_on(self) -> None:
        while not self._end.wait(_WRITE_SECONDS):
            with self._writing:
                self._write()

    def _write(self) -> None:
        """Writes what is new, or keeps it for the next call if that fails."""
        with self._counting:
            new, self._new = self._new, Counter()
        rows, rows_of_adapters = [], []
        for caller, day, adapter in sorted({key[:3] for key in new}):
            counts = [new[caller, day, adapter, column] for column in _COLUMNS]
            if adapter:
                rows_of_adapters.append((caller, day, adapter, *counts))
            else:
                rows.append((caller, day, *counts))
        if not rows:
            return
        try:
            with self._database:  # commits, or rolls back
                self._database.executemany(_ADD, rows)
                self._database.executemany(_ADD_OF_ADAPTER, rows_of_adapters)
            self._is_behind = False
        except sqlite3.Error as error:
            if not self._is_behind:
                logger.error("usage cannot be written, and is kept in memory for now: %s", error)
            self._is_behind = True
            with self._counting:
                self._new.update(new)


def _open(file: str | Path) -> sqlite3.Connection:
    try:
        if file != IN_MEMORY:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(file, timeout=_LOCK_SECONDS, check_same_thread=False)
        try:
            _prepare(database)
        except sqlite3.Error:
            database.close()
            raise
    except (OSError, sqlite3.Error) as error:
        raise SetupError(
            f"usage cannot be kept in {file} ({error}); choose another file with --usage-db"
        ) from None
    return database


def _prepare(database: sqlite3.Connection) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version not in (0, 1, _VERSION):
        raise sqlite3.DatabaseError(f"version {version} is not ours")
    # With a write-ahead log a killed process leaves a valid file, and readers block no writer.
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    with database:
        database.execute("BEGIN IMMEDIATE")  # several processes may open a new or an old file
        (version,) = database.execute("PRAGMA user_version").fetchone()
        database.execute(_TABLE)
        database.execute(_ADAPTER_TABLE)
        if version == 1:
            database.execute(_ADD_CACHED)
        database.execute(f"PRAGMA user_version = {_VERSION}")
