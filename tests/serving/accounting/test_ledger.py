"""The ledger in a real file, also when its process is killed."""

import logging
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.accounting.ledger import Usage, UsageLedger, default_ledger_file
from serving.errors import Unavailable

NOON = 1795262400.0  # 2026-11-21 12:00 UTC
DAY = 86_400.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "usage.db"


@pytest.fixture
def ledger(file: Path) -> Iterator[UsageLedger]:
    ledger = UsageLedger(file, clock=lambda: NOON)
    yield ledger
    ledger.close()


def test_sums_by_caller_and_day() -> None:
    now = NOON
    ledger = UsageLedger(clock=lambda: now)
    ledger.add("b", 3, 4)
    ledger.add("a", 1, 2)
    ledger.add("b", 10, 20)
    now += DAY / 2  # midnight
    ledger.add("b", 5, 0)
    assert ledger.report("b") == [
        Usage("b", "2026-11-21", requests=2, prompt_tokens=13, completion_tokens=24),
        Usage("b", "2026-11-22", requests=1, prompt_tokens=5, completion_tokens=0),
    ]
    assert ledger.report() == [Usage("a", "2026-11-21", 1, 1, 2), *ledger.report("b")]
    assert ledger.report("c") == []
    ledger.close()


def test_it_survives_a_restart(file: Path) -> None:
    for _ in range(3):
        ledger = UsageLedger(file, clock=lambda: NOON)
        ledger.add("me", 1, 10)
        ledger.close()
    ledger = UsageLedger(file, clock=lambda: NOON)
    assert ledger.report() == [Usage("me", "2026-11-21", 3, 3, 30)]
    ledger.close()


def test_two_processes_add_to_one_file(file: Path, ledger: UsageLedger) -> None:
    other = UsageLedger(file, clock=lambda: NOON)
    ledger.add("me", 1, 0)
    other.add("me", 0, 1)
    assert ledger.report() == [Usage("me", "2026-11-21", 1, 1, 0)]
    assert other.report() == ledger.report() == [Usage("me", "2026-11-21", 2, 1, 1)]
    other.close()


def test_a_killed_process_loses_nothing_but_its_last_second(file: Path) -> None:
    code = (
        "import sys, pathlib; from serving.accounting.ledger import UsageLedger\n"
        "ledger = UsageLedger(pathlib.Path(sys.argv[1]), clock=lambda: float(sys.argv[2]))\n"
        "for i in range(100): ledger.add('me', 1, 2)\n"
        "print('added', flush=True)\n"
        "sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(file), str(NOON)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    with process.stdin, process.stdout:
        assert process.stdout.readline() == b"added\n"
        expected = [("me", "2026-11-21", 100, 100, 200)]
        deadline = time.monotonic() + 10
        while rows(file) != expected and time.monotonic() < deadline:
            time.sleep(0.05)  # it writes by itself, twice a second
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    ledger = UsageLedger(file, clock=lambda: NOON)
    assert ledger.report() == [Usage(*expected[0])]
    ledger.close()


def rows(file: Path) -> list[tuple[object, ...]]:
    database = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        query = "SELECT caller, day, requests, prompt_tokens, completion_tokens FROM usage"
        return database.execute(query).fetchall()
    finally:
        database.close()


def test_what_cannot_be_written_is_kept(
    file: Path, ledger: UsageLedger, caplog: pytest.LogCaptureFixture
) -> None:
    other = sqlite3.connect(file)
    other.execute("CREATE TRIGGER full BEFORE INSERT ON usage BEGIN SELECT RAISE(ABORT, 'x'); END")
    with caplog.at_level(logging.ERROR):
        ledger.add("me", 1, 2)
        assert ledger.report() == ledger.report() == []
    assert [record.message for record in caplog.records] == [
        "usage cannot be written, and is kept in memory for now: x"
    ]
    ledger.add("me", 1, 2)
    other.execute("DROP TRIGGER full")
    other.close()
    assert ledger.report() == [Usage("me", "2026-11-21", 2, 2, 4)]


def test_a_file_of_the_first_version_is_taken_over(file: Path) -> None:
    file.parent.mkdir()
    old = sqlite3.connect(file)
    old.execute(
        "CREATE TABLE usage (caller TEXT NOT NULL, day TEXT NOT NULL, requests INTEGER NOT NULL, "
        "prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, "
        "PRIMARY KEY (caller, day)) WITHOUT ROWID"
    )
    old.execute("INSERT INTO usage VALUES ('me', '2026-11-21', 1, 2, 3)")
    old.execute("PRAGMA user_version = 1")
    old.commit()
    old.close()
    ledgers = [UsageLedger(file, clock=lambda: NOON) for _ in range(2)]
    ledgers[0].add("me", 10, 20, 5)
    assert ledgers[0].report() == [Usage("me", "2026-11-21", 2, 12, 23, cached_tokens=5)]
    assert ledgers[1].report() == ledgers[0].report()
    for ledger in ledgers:
        ledger.close()


def test_a_file_that_cannot_be_read_now_is_unavailable(file: Path, ledger: UsageLedger) -> None:
    ledger.add("me", 1, 2)
    assert ledger.report()
    other = sqlite3.connect(file)
    other.execute("DROP TABLE usage")
    other.commit()
    other.close()
    with pytest.raises(Unavailable, match="usage cannot be read now; try again"):
        ledger.report()


@pytest.mark.parametrize("what", ["folder", "text", "future"])
def test_a_file_that_is_no_ledger(tmp_path: Path, what: str) -> None:
    file = tmp_path / "x"
    if what == "folder":
        file.mkdir()
    if what == "text":
        file.write_text("dear diary, " * 100)
    if what == "future":
        database = sqlite3.connect(file)
        database.execute("PRAGMA user_version = 3")
        database.close()
    with pytest.raises(ValueError, match=f"cannot be kept in {file} .* with --usage-db"):
        UsageLedger(file)


@pytest.mark.skipif(sys.platform != "linux", reason="the specification of Linux desktops")
def test_the_default_file_is_in_the_folder_for_state(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_ledger_file() == str(tmp_path / "mixtral-jax" / "usage.db")


def test_what_adapters_have_answered_stands_behind_the_whole_day(file: Path) -> None:
    for _ in range(2):  # the second time into a file that is there
        ledger = UsageLedger(file, lambda: NOON)
        ledger.add("ann", 5, 2, 1)
        ledger.add("ann", 7, 3, 0, "tuned")
        ledger.add("bob", 1, 1, 0, "other")
        ledger.close()
    ledger = UsageLedger(file, lambda: NOON)
    try:
        (whole, tuned) = ledger.report("ann")
        assert (whole.adapter, whole.requests, whole.prompt_tokens) == ("", 4, 24)
        assert (whole.completion_tokens, whole.cached_tokens) == (10, 2)
        assert tuned == Usage("ann", whole.day, 2, 14, 6, 0, "tuned")
        named = [(row.caller, row.adapter) for row in ledger.report()]
        assert named == [("ann", ""), ("ann", "tuned"), ("bob", ""), ("bob", "other")]
    finally:
        ledger.close()
