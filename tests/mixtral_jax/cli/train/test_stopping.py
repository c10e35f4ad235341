"""Signals end a process at once, or let a run finish its step: real processes, real signals."""

import signal
import subprocess
import sys

import pytest

from tests.support.servers import ROOT, environment

PROGRAM = """
import os, sys, threading
from mixtral_jax.cli.train.stopping import Stopping

def say(text):  # in one piece, as two threads do
    os.write(1, f"{text}\\n".encode())

told = threading.Event()
with Stopping(say, lambda: "step 7 is saved") as stopping:
    if sys.argv[1] == "steps":
        with stopping.finishing(told.set):
            say("begun")
            told.wait()
            say("finishing")
            if len(sys.argv) > 2:
                threading.Event().wait()
        sys.exit(stopping.status)
    say("begun")
    threading.Event().wait()
"""


def ended_by(*signals: signal.Signals, phase: str) -> tuple[int, list[str]]:
    """The status and the lines of a process that gets signals, each when it has said something."""
    waits = ["waits"] if len(signals) > 1 else []
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, phase, *waits],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    for number in signals:
        process.send_signal(number)
        while number is not signals[-1] and "finishing\n" not in lines:
            line = process.stdout.readline()
            assert line, f"it ended after {lines}"
            lines.append(line)
    output, _ = process.communicate(timeout=60)
    return process.returncode, [*map(str.strip, lines), *output.splitlines()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_before_the_steps_a_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    assert ended_by(number, phase="load") == (128 + number, ["begun", "step 7 is saved"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish(number: signal.Signals) -> None:
    status, lines = ended_by(number, phase="steps")
    assert (status, lines[0]) == (128 + number, "begun")
    assert set(lines[1:]) == {
        "finishing",
        "stopping after the step that runs now; Ctrl-C ends it at once",
    }


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    status, lines = ended_by(signal.SIGTERM, signal.SIGINT, phase="steps")
    assert (status, lines[-1]) == (130, "step 7 is saved")
