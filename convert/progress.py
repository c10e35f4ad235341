"""A progress bar for commands that move bytes."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, often."""


@contextmanager
def bar(description: str, console: Console | None = None) -> Iterator[Progress]:
    """Yields the `progress` of a bar on standard error, which leaves a last line.

    Without a terminal there is the last line only; without any bytes, or after an error, nothing.
    A notebook is none, although it asks for colours (FORCE_COLOR).
    """
    console = console or Console(stderr=True, force_terminal=sys.stderr.isatty())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    start, done = time.perf_counter(), 0
    shown = rich.progress.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    )
    with shown:
        task = shown.add_task(description, total=None)

        def report(now: int, total: int) -> None:
            nonlocal done
            done = now
            shown.update(task, completed=now, total=total)

        yield report
    if done:
        seconds = time.perf_counter() - start
        rate = done / max(seconds, 1e-9) / 1e6
        console.print(
            f"{description}: {done / 1e6:,.0f} MB in {seconds:.0f} s ({rate:,.0f} MB/s)",
            highlight=False,
        )
