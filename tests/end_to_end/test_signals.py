"""Real signals to whatever starts servers: nothing that it started is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from tests.support.servers import COMMAND, ROOT, environment

PATIENCE = 60.0


@contextmanager
def running(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if alive(process) else ():
            child.kill()
        process.kill()
        process.communicate()


def alive(process: "subprocess.Popen[str]") -> bool:
    return process.poll() is None


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def descendants(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def check_ends(process: "subprocess.Popen[str]", number: signal.Signals, count: int) -> None:
    """Waits for `count` descendants, sends the signal, and waits for all of them to be gone."""
    until(lambda: len(descendants(process)) >= count)
    started = descendants(process)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    _, left = psutil.wait_procs(started, timeout=PATIENCE)
    assert not left


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_benchmark_ends_what_it_started(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "benchmarks.gateway", "--clients=1", "--tokens=10000000"]
    with running(command) as process:
        check_ends(process, number, 2)  # the stand-in for a service, and the gateway


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_bench_ends_the_server_that_it_started(number: signal.Signals) -> None:
    command = [COMMAND, "bench", "tiny-random", "--concurrency=1", "--requests=100000"]
    with running(command) as process:
        check_ends(process, number, 3)  # the supervisor, the service and the gateway
