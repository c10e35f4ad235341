"""When a process is started again and when not, with a program that dies as it is told."""

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from serving.child import Child, Probe, Restarts, SupervisorError
from serving.parent import BEAT_VARIABLE
from tests.support.clock import Clock

PATIENCE = 20.0
# Notes each of its starts; the first word of the file `fate` is its status, "live" none. With a
# pipe for its heartbeat it writes a byte every 10 ms.
MORTAL = f"""
import os, pathlib, sys, time
here = pathlib.Path(__file__).parent
fate, _, rest = (here / "fate").read_text().partition(" ")
(here / "fate").write_text(rest)
with (here / "starts").open("a") as starts:  # last: whoever sees it may end this process
    starts.write("x")
pipe = os.environ.get({BEAT_VARIABLE!r})
end = time.monotonic() + 60
while fate == "live" and time.monotonic() < end:
    if pipe:
        os.write(int(pipe), b"1")
    time.sleep(0.01)
sys.exit(int(fate))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mortal.py").write_text(MORTAL)
    return tmp_path


@contextmanager
def child_of(folder: Path, fate: str, **settings: Any) -> Iterator[Child]:
    (folder / "fate").write_text(fate)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    child = Child("service", ["mortal"], environment, **settings)
    try:
        yield child
    finally:
        if child.process is not None:
            child.process.kill()
            child.process.wait()
        child.close()


def starts(folder: Path) -> int:
    file = folder / "starts"
    return len(file.read_text()) if file.exists() else 0


def keep_running(child: Child, until: Callable[[], bool], clock: Clock | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not until():
        child.keep_running()
        assert time.monotonic() < deadline
        time.sleep(0.02)
        if clock is not None:
            clock.now += 0.5


def waits(capfd: pytest.CaptureFixture[str]) -> list[str]:
    lines = capfd.readouterr().err.splitlines()
    return [line.rpartition("again ")[2] for line in lines if "again" in line]


def serve_and_die(child: Child, folder: Path, clock: Clock, seconds: float) -> None:
    """Starts it after its wait, lets it serve for so long, kills it, and notes its death."""
    before = starts(folder)
    clock.now += 30.0
    keep_running(child, lambda: starts(folder) > before)
    assert child.process is not None and not child.has_served
    child.note_serving()
    clock.now += seconds
    child.process.kill()
    child.process.wait()
    child.keep_running()


def test_what_never_served_is_not_tried_again(folder: Path) -> None:
    with (
        child_of(folder, "3 live") as child,
        pytest.raises(SupervisorError, match="the service ended with status 3; see above"),
    ):
        keep_running(child, lambda: False)
    assert starts(folder) == 1


def test_deaths_soon_after_one_another_are_waited_for_longer_and_longer(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A request that kills the service each time must not make a loop of starts."""
    clock = Clock()
    with child_of(folder, "live " * 8, clock=clock) as child:
        for _ in range(7):
            serve_and_die(child, folder, clock, seconds=59.0)
        assert waits(capfd) == ["now", *(f"in {n} s" for n in (1, 3, 7, 15, 30, 30))]
        clock.now += 29.0  # of 30
        child.keep_running()
        assert child.process is None
        serve_and_die(child, folder, clock, seconds=60.0)
        assert waits(capfd) == ["now"]  # it had served for a minute


def test_what_does_not_live_to_serve_again_is_given_up(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    with child_of(folder, "live 1 2 3 4", clock=clock) as child:
        serve_and_die(child, folder, clock, seconds=0.0)
        words = "ended 4 times before it could serve, .* status 4"
        with pytest.raises(SupervisorError, match=words):
            keep_running(child, lambda: False, clock)
    assert starts(folder) == 5
    assert waits(capfd) == ["now", "in 1 s", "in 3 s", "in 7 s"]


def test_status_0_means_that_it_was_told_to_end(folder: Path) -> None:
    with child_of(folder, "0 live") as child:
        keep_running(child, lambda: child.was_told_to_end)
        child.keep_running()
    assert starts(folder) == 1


@pytest.mark.parametrize("number", [signal.SIGSTOP, None])
def test_a_service_whose_heart_stops_is_killed_and_started_again(
    folder: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals | None
) -> None:
    """Also one that is stopped, in which nothing of its own can end it."""
    clock = Clock()
    with child_of(folder, "live live", clock=clock, beat_seconds=5.0) as child:
        keep_running(child, lambda: child.has_beaten)
        child.note_serving()
        clock.now += 4.9
        child.keep_running()
        assert child.process is not None
        if number is None:  # it beats on
            clock.now += 100.0
            assert child._beats is not None
            assert select.select([child._beats], [], [], PATIENCE)[0]
            child.keep_running()
            assert child.process.poll() is None
            return
        child.process.send_signal(number)
        time.sleep(0.05)
        child.keep_running()  # reads the last beats
        clock.now += 5.1
        keep_running(child, lambda: starts(folder) == 2)
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "mixtral-jax: the service has not moved for 5 s; it is killed"
    assert said[1] == "mixtral-jax: the service ended with SIGKILL; it is started again now"


def test_a_service_that_has_not_begun_to_beat_may_load_for_hours(folder: Path) -> None:
    clock = Clock()
    with child_of(folder, "live", clock=clock) as child:
        keep_running(child, lambda: starts(folder) == 1)
        clock.now += 10_000.0
        child.keep_running()
        assert child.process is not None and child.process.poll() is None


def test_a_server_that_does_not_answer_is_killed_after_some_questions(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    answers = [True, False, False, True, False, False, False]
    asked: list[float] = []

    def answer() -> bool:
        asked.append(clock.now)
        return answers[len(asked) - 1]

    probe = Probe(answers=answer, interval=10.0, max_failures=3)
    settings = {"clock": clock, "probe": probe, "restarts": Restarts(settled_seconds=50.0)}
    with child_of(folder, "live live", **settings) as child:
        keep_running(child, lambda: starts(folder) == 1)
        clock.now += 500.0
        child.keep_running()
        assert not asked  # it may take its time to serve
        child.note_serving()
        began = clock.now
        while len(asked) < len(answers):
            child.keep_running()
            clock.now += 1.0
        keep_running(child, lambda: starts(folder) == 2)
        assert [moment - began for moment in asked] == [0, 10, 20, 30, 40, 50, 60]
        assert not child.has_served
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "mixtral-jax: the service did not answer 3 times; it is killed"
