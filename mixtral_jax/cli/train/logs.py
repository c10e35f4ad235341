"""Logs of a run: a line of JSON for each record, TensorBoard's events, and a picture of the curves.

OUTPUT/log.jsonl       {"kind": "step", "step": 1, "loss": 2.4, ...}
OUTPUT/tensorboard/    the same figures as scalars
OUTPUT/curves.png      loss, validation loss, learning rate and gradient norm by step
"""

import dataclasses
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from mixtral_jax.training.records import Record, StepRecord, ValidationRecord

LOG, CURVES, TENSORBOARD = "log.jsonl", "curves.png", "tensorboard"


class Logs:
    """Writes records to the folder of a run, behind what an earlier part of the run wrote.

    Args:
        folder: of the run; it exists.
        step: the step that the run goes on from. Records of later steps in the log are of a part
            of the run that is done again, and are taken out.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / LOG
        self._picture = folder / CURVES
        self._lines = [line for line in read_log(self._path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        self._path.write_text(text, encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        board = folder / TENSORBOARD
        board.mkdir(exist_ok=True)
        # Its SummaryWriter writes in a thread, and waits for ever when that died of a full disk.
        self._board = EventsWriter(str(board / "events"))
        start = SessionLog(status=SessionLog.START)  # takes the place of later steps
        self._board.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, record: Record) -> None:
        """Writes a record."""
        line = as_line(record)
        self._lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                summary = scalar(f"{line['kind']}/{name}", value)
                event = Event(wall_time=time.time(), step=line["step"], summary=summary)
                self._board.write_event(event)
        self._board.flush()

    def close(self) -> None:
        """Ends the logs and draws the curves; a disk that is full has raised an error before."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._board.close()
        with suppress(OSError):
            draw_curves(self._lines, self._picture)


def as_line(record: Record) -> dict[str, Any]:
    """Returns a record as plain values; numbers that are not finite are null."""
    kind = type(record).__name__.removesuffix("Record").lower()
    line: dict[str, Any] = {"kind": kind}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, np.ndarray):
            if not value.size:
                continue
            value = [[round(float(x), 6) for x in row] for row in np.atleast_2d(value)]
        elif isinstance(value, float) and not np.isfinite(value):
            value = None
        line[field.name] = value
    return line


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log; an unfinished last line, of a run that was killed, is none."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def draw_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """Draws the curves of a log's lines into a PNG file."""
    steps = [line for line in lines if line["kind"] == kind_of(StepRecord)]
    checks = [line for line in lines if line["kind"] == kind_of(ValidationRecord)]
    has_pairs = any(row["margin"] or row["accuracy"] for row in steps)
    figure = Figure(figsize=(9, 9 if has_pairs else 6), layout="constrained")
    axes = figure.subplots(3 if has_pairs else 2, 2, sharex=True)
    panels = [
        (axes[0, 0], steps, "loss", "loss"),
        (axes[0, 1], steps, "gradient_norm", "gradient norm"),
        (axes[1, 0], steps, "learning_rate", "learning rate"),
        (axes[1, 1], steps, "tokens_per_second", "tokens a second"),
    ]
    if has_pairs:
        panels.append((axes[2, 0], steps, "margin", "reward margin"))
        panels.append((axes[2, 1], steps, "accuracy", "share of pairs with a margin above 0"))
    for plot, rows, name, title in panels:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if name == "tokens_per_second":
            points = [(row["step"], row["tokens"] / row["seconds"]) for row in rows]
        plot.plot([x for x, _ in points], [y for _, y in points], linewidth=1, label="training")
        plot.set_title(title)
        plot.grid(alpha=0.3)
    for plot, _, name, _ in panels:
        points = [(row["step"], row[name]) for row in checks if row.get(name) is not None]
        if points:
            xs, ys = zip(*points, strict=True)
            plot.plot(xs, ys, marker="o", label="validation")
            plot.legend()
    for plot in axes[-1]:
        plot.set_xlabel("step")
    figure.savefig(path, dpi=120)


def kind_of(record: type) -> str:
    """Returns the word by which a log's lines name a kind of record."""
    return record.__name__.removesuffix("Record").lower()
