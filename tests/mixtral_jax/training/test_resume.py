"""A run that was killed goes on as if it had not been: real processes, real signals."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import ROOT, environment, free_ports

pytestmark = pytest.mark.slow
STEPS = 16


def started(folder: Path, steps: int, pause: float = 0.0, **more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.support.training_run", str(folder), str(steps)]
    return subprocess.Popen(
        [*command, str(pause)],
        cwd=ROOT,
        env=environment(**{"JAX_NUM_CPU_DEVICES": "1", **more}),
        stdout=subprocess.PIPE,
        text=True,
    )


def lines_of(process: "subprocess.Popen[str]") -> list[dict[str, Any]]:
    """Everything that it says until it ends; it must end well."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def killed_at(
    process: "subprocess.Popen[str]", step: int, number: signal.Signals, pause: float = 0.02
) -> list[Any]:
    """What it says until a step is done, and behind that until the signal acts."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        if line.startswith("{"):
            lines.append(json.loads(line))
        if lines and lines[-1].get("step") == step:
            # Around the end of the pause, which a checkpoint follows: also while it is written.
            time.sleep(pause - 0.02 + random.random() * 0.05)
            process.send_signal(number)
            break
    lines += [json.loads(line) for line in process.stdout if line.startswith("{")]
    process.stdout.close()
    process.wait(60)
    return lines


def losses(lines: list[dict[str, Any]]) -> dict[int, str]:
    return {line["step"]: line["loss"] for line in lines if "step" in line}


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    kills = 10 if "MIXTRAL_JAX_SOAK" in os.environ else 2
    steps = 4 * kills + 8
    whole = lines_of(started(tmp_path / "whole", steps))
    want = losses(whole)
    folder = tmp_path / "killed"
    at = 0
    for _ in range(kills):
        at += random.randint(2, 4)
        # A reader that is late by less than all the pauses kills before the run's end.
        lines = killed_at(started(folder, steps, 0.2), at, signal.SIGKILL, 0.2)
        got = losses(lines)
        assert got and got.items() <= want.items(), f"killed after step {at}"
        # A checkpoint is there every two steps, of which the last may have been under way.
        assert min(got) >= at - 8
    rest = lines_of(started(folder, steps))
    assert losses(rest).items() <= want.items()
    assert rest[-1] == whole[-1]
    assert rest[-1]["end"] is True


@pytest.mark.soak
def test_a_run_that_is_told_to_end_saves_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lines = killed_at(started(folder, STEPS, 0.1), 3, signal.SIGTERM)
    last = max(losses(lines))
    assert lines[-1]["end"] is False and last < STEPS
    assert (folder / str(last)).is_dir()
    rest = lines_of(started(folder, STEPS))
    assert min(losses(rest)) == last + 1 and rest[-1]["end"] is True


@pytest.mark.soak
def test_a_run_goes_on_in_two_processes(tmp_path: Path) -> None:
    """The rows are the same, and split: sums have another order, so losses differ by rounding."""
    want = losses(lines_of(started(tmp_path / "whole", STEPS)))
    folder = tmp_path / "moved"
    killed_at(started(folder, STEPS, 0.02), 7, signal.SIGTERM)
    group = {"COORDINATOR": f"127.0.0.1:{free_ports(1)[0]}", "NUM_PROCESSES": "2"}
    processes = [started(folder, STEPS, 0.0, **group, PROCESS_ID=str(i)) for i in range(2)]
    both = [lines_of(process) for process in processes]
    assert both[0] == both[1]
    got = losses(both[0])
    assert 7 < min(got) < STEPS == max(got)
    for step, loss in got.items():
        assert float.fromhex(loss) == pytest.approx(float.fromhex(want[step]), rel=1e-6)
