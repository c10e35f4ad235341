"""The service's own time for a token: all of it is real but the device, which draws at once.

    python -m benchmarks.service MODEL [--streams 8,64,256] [--processes 1,2,4] [--step-ms 10]
        [--json FILE]

MODEL is a checkpoint, of which only the tokenizer is read. Scheduler, worker, text and gRPC are the
service's own; the device (device.py) answers each step with fixed tokens, at once or after
--step-ms, which lets streams keep up as beside a real one. The load is another process, whose time
is not counted. Printed are microseconds of processor time for a token, of all threads and processes
of the service, those of the requests (tokenizing, scheduling their prompts) included. With
--processes the engine has a process of its own and so many others answer. Each figure is the median
of --repeats.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import typer

from benchmarks.command import run
from benchmarks.service.load import Seen, load
from benchmarks.service.server import serve
from serving.parent import PARENT_VARIABLE

_KEY = "this-key-is-not-a-secret"


@contextmanager
def started(
    model: Path, streams: int, processes: int, step_ms: float
) -> Iterator[tuple[psutil.Process, list[str]]]:
    """Starts the service in a process of its own; yields it and its addresses."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "benchmarks.service", str(model), "--serve"),
            *("--streams", str(streams), "--processes", str(processes)),
            *("--step-ms", str(step_ms)),
        ],
        env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
        stdout=subprocess.PIPE,
        stderr=None if processes == 1 else subprocess.DEVNULL,  # a line for each call
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the service ended early")
        yield psutil.Process(process.pid), [f"127.0.0.1:{int(port)}" for port in line.split()]
    finally:
        process.terminate()
        process.wait(30)


def _busy(process: psutil.Process) -> float:
    """Seconds of processor time of a process and its children so far."""
    processes = (process, *process.children(recursive=True))
    times = [process.cpu_times() for process in processes]
    return sum(time.user + time.system for time in times)


def measure(
    model: Path, streams: int, processes: int, tokens: int, step_ms: float, repeats: int
) -> dict[str, Any]:
    """Returns the figures of one number of streams and of processes, medians of the repeats."""
    with started(model, streams, processes, step_ms) as (service, targets):
        asyncio.run(load(targets, _KEY, streams, 32))  # finds caches cold
        costs: list[float] = []
        seen: list[Seen] = []
        for _ in range(repeats):
            before = _busy(service)
            seen.append(asyncio.run(load(targets, _KEY, streams, tokens)))
            costs.append((_busy(service) - before) / seen[-1].tokens * 1e6)
    return {
        "streams": streams,
        "processes": processes,
        "microseconds_per_token": round(median(costs), 1),
        "tokens_per_second": round(median(measured.tokens / measured.seconds for measured in seen)),
        "tokens_per_chunk": round(
            median(measured.tokens / measured.chunks for measured in seen), 2
        ),
    }


def main(
    model: Annotated[Path, typer.Argument(help="Checkpoint whose tokenizer is used.")],
    streams: Annotated[str, typer.Option(help="Numbers of streams.")] = "8,64,256",
    processes: Annotated[str, typer.Option(help="Numbers of processes that answer.")] = "1",
    tokens: Annotated[int, typer.Option(min=1, max=1900, help="Of an answer.")] = 400,
    step_ms: Annotated[float, typer.Option(min=0, help="Time of a step.")] = 0.0,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
    is_server: Annotated[bool, typer.Option("--serve", hidden=True)] = False,
) -> None:
    """Measure the processor time that the service takes for a token."""
    if is_server:
        serve(model, int(streams), step_ms / 1e3, int(processes), _KEY)
        return
    figures = []
    print("| streams | processes | us a token | tokens/s | tokens a chunk |")
    print("|---|---|---|---|---|")
    wanted = [
        (int(number), int(count)) for number in streams.split(",") for count in processes.split(",")
    ]
    for number, count in wanted:
        row = measure(model, number, count, tokens, step_ms, repeats)
        print(f"| {' | '.join(str(value) for value in row.values())} |", flush=True)
        figures.append(row)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main, "benchmarks.service")
