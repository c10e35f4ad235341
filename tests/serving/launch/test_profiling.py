"""Profiles are started and ended by orders, one at a time, and never end the process."""

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mixtral_jax.errors import ConfigError
from serving.launch.profiling import Order, Profiling


class Recorder:
    """A tracer that counts, and whose end can be waited for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.may_write = threading.Event()
        self.may_write.set()
        self.error: Exception | None = None

    def start(self, folder: Path) -> None:
        assert folder.is_dir()
        if self.error is not None:
            raise self.error
        self.calls.append("start")

    def stop(self) -> None:
        self.may_write.wait(10)
        self.calls.append("stop")


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "serving")
    return caplog


def await_(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_profile_ends_by_itself(
    tmp_path: Path, handlers: None, log: pytest.LogCaptureFixture
) -> None:
    tracer = Recorder()
    profiling = Profiling(tmp_path / "new" / "folder", 0.05, tracer)
    profiling.listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    await_(lambda: re.search(r"a profile of \d+\.\d s is in ", log.text) is not None)
    assert tracer.calls == ["start", "stop"]
    profiling.close()


def test_a_second_start_is_refused_and_a_signal_ends_the_first(
    tmp_path: Path, handlers: None, log: pytest.LogCaptureFixture
) -> None:
    tracer = Recorder()
    profiling = Profiling(tmp_path, 100, tracer)
    profiling.listen()
    os.kill(os.getpid(), signal.SIGUSR2)
    await_(lambda: "no profile is ended: none is recorded" in log.text)
    os.kill(os.getpid(), signal.SIGUSR1)
    await_(lambda: tracer.calls == ["start"])
    os.kill(os.getpid(), signal.SIGUSR1)
    await_(lambda: "no second profile is started: one is recorded, and ends in" in log.text)
    os.kill(os.getpid(), signal.SIGUSR2)
    await_(lambda: tracer.calls == ["start", "stop"])
    profiling.close()


def test_a_start_while_the_first_is_written_is_refused(
    tmp_path: Path, handlers: None, log: pytest.LogCaptureFixture
) -> None:
    tracer = Recorder()
    tracer.may_write.clear()
    profiling = Profiling(tmp_path, 0.01, tracer)
    profiling.listen()
    profiling.order(Order.START)
    await_(lambda: tracer.calls == ["start"])
    time.sleep(0.1)
    profiling.order(Order.START)
    tracer.may_write.set()
    await_(lambda: "no second profile is started" in log.text)
    profiling.close()
    assert tracer.calls == ["start", "stop"]


def test_the_end_of_the_process_writes_what_is_recorded(tmp_path: Path, handlers: None) -> None:
    tracer = Recorder()
    profiling = Profiling(tmp_path, 100, tracer)
    profiling.listen()
    profiling.order(Order.START)
    profiling.close()
    assert tracer.calls == ["start", "stop"]


def test_an_error_is_logged_and_the_next_profile_works(
    tmp_path: Path, handlers: None, log: pytest.LogCaptureFixture
) -> None:
    tracer = Recorder()
    tracer.error = RuntimeError("somebody else records")
    profiling = Profiling(tmp_path, 100, tracer)
    profiling.listen()
    profiling.order(Order.START)
    await_(lambda: "the server goes on: somebody else records" in log.text)
    tracer.error = None
    profiling.order(Order.START)
    await_(lambda: tracer.calls == ["start"])
    profiling.close()


def test_without_a_folder_signals_are_answered_by_a_line(
    handlers: None, log: pytest.LogCaptureFixture
) -> None:
    tracer = Recorder()
    profiling = Profiling(None, 100, tracer)
    profiling.listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    await_(lambda: "started without --profile DIR" in log.text)
    profiling.close()
    assert tracer.calls == []


def test_a_folder_that_cannot_be_made_is_refused_at_the_start(
    tmp_path: Path, handlers: None
) -> None:
    (tmp_path / "file").touch()
    profiling = Profiling(tmp_path / "file" / "profiles", 60, Recorder())
    with pytest.raises(ConfigError, match="^--profile is .*/file/profiles, which cannot be wr"):
        profiling.listen()
