"""The log of a run that goes on has every step once."""

import json
from pathlib import Path

import numpy as np

from mixtral_jax.cli.train.logs import Logs, read_log
from mixtral_jax.training.records import EndRecord, StepRecord, ValidationRecord


def step(number: int, loss: float = 1.5) -> StepRecord:
    return StepRecord(
        step=number,
        loss=loss,
        tokens=100,
        targets=40.0,
        seconds=0.5,
        gradient_norm=2.0,
        learning_rate=1e-3,
        aux=0.0,
        z=0.0,
        accuracy=0.0,
        margin=0.0,
        expert_load=np.zeros((0, 0)),
        is_skipped=not np.isfinite(loss),
        skipped=0,
    )


def test_a_run_that_is_stopped_and_goes_on(tmp_path: Path) -> None:
    logs = Logs(tmp_path, 0)
    for number in (1, 2, 3):
        logs.write(step(number))
    logs.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "st')  # it was killed while it wrote
    logs = Logs(tmp_path, 2)  # its last checkpoint is that of step 2
    logs.write(step(3, float("nan")))
    logs.write(ValidationRecord(step=3, loss=1.0, targets=9.0, seconds=0.1))
    logs.write(EndRecord(step=3, is_finished=True))
    logs.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        *(("step", 1), ("step", 2), ("step", 3)),
        *(("validation", 3), ("end", 3)),
    ]
    assert lines[2]["loss"] is None  # JSON has no NaN
    assert "expert_load" not in lines[0]
    assert read_log(tmp_path / "log.jsonl") == lines
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_record_is_a_line_of_text() -> None:
    assert str(step(3)) == "step 3: loss 1.500, 0.5 s"
    assert str(step(4, float("nan"))) == "step 4: skipped, as it is not finite, 0.5 s"
    assert str(EndRecord(step=4, is_finished=False)) == "step 4: stopped"
