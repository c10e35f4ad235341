"""Repeated measurements and their report: facts of the machine, a table, JSON and a plot.

matplotlib draws the plot and is no dependency: `BenchError` names the extra that brings it.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from serving.bench.load import (
    PERCENTILES,
    BenchError,
    Endpoint,
    Level,
    Progress,
    measure,
    prompts,
    words_for,
)

Measure = Callable[[int, int, int, Progress], Level]
"""Measures a level: number of requests, of clients, seed, and a callback for progress."""

_INSTRUCTION_SETS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm"),
)
_PACKAGES = ("mixtral-jax", "jax", "jaxlib", "flax")


def load_of(
    endpoint: Endpoint, *, prompt_tokens: int, answer_tokens: int, shared_prefix: int
) -> Measure:
    """Returns how a level is measured at an endpoint; sends a first request, which is not counted.

    Raises BenchError if that one fails.
    """
    words = words_for(endpoint, prompt_tokens)

    def measure_level(requests: int, clients: int, seed: int, progress: Progress) -> Level:
        texts = prompts(requests, words, seed=seed, shared=shared_prefix)
        return measure(
            endpoint, texts, concurrency=clients, max_tokens=answer_tokens, progress=progress
        )

    return measure_level


def repeated(
    measure_level: Measure, clients: Sequence[int], *, requests: int | None, repeat: int, seed: int
) -> dict[int, list[Level]]:
    """Measures all levels `repeat` times, in turn, under a progress bar on standard error.

    Args:
        measure_level: Measures a level.
        clients: Number of clients of each level.
        requests: Requests of a level; None: two for each client, and eight at least.
        repeat: How often each level is measured.
        seed: Seed of the prompts, which differ between all levels and repeats.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)
    runs: dict[int, list[Level]] = {count: [] for count in clients}
    with Bar(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        for turn in range(repeat):
            for count in clients:
                number = requests or max(8, 2 * count)
                task = bar.add_task(f"{count} at once, {turn + 1} of {repeat}", total=number)

                def report(done: int, total: int, task: Any = task) -> None:
                    bar.update(task, completed=done, total=total)

                number_of_run = seed * 1_000_003 + turn * 1_009 + count
                runs[count].append(measure_level(number, count, number_of_run, report))
                bar.remove_task(task)
    return runs


def facts() -> dict[str, Any]:
    """Returns facts of the machine, its present load, and the versions of packages."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpu": _cpu(),
        "instruction_sets": _instruction_sets(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _instruction_sets() -> list[str]:
    """Those of the processor that decide which form of the kernels runs, as Linux names them."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    words = set(line[1].split()) if line else set()
    return [name for name in _INSTRUCTION_SETS if name in words]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(levels: Sequence[Level]) -> Table:
    """Returns a table with a row for each level, times in milliseconds, and failures below."""
    percents = " ".join(f"{f'p{percent}':>5}" for percent in PERCENTILES)
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("clients", "tokens\nin / out", "tokens/s", "requests/s"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name in ("TTFT, ms", "ITL, ms"):
        shown.add_column(f"{name}\n{percents}", justify="right", no_wrap=True)
    failed = []
    for level in levels:
        shown.add_row(
            str(level.concurrency),
            f"{level.prompt_tokens:.0f} / {level.answer_tokens:.0f}",
            _number(level.tokens_per_second),
            _number(level.requests_per_second),
            " ".join(f"{_number(value * 1000):>5}" for value in level.ttft.values()),
            " ".join(f"{_number(value * 1000):>5}" for value in level.itl.values()),
        )
        if level.errors:
            failed.append(f"{level.concurrency} clients: {level.errors} failed")
            failed.append(f"  the first one: {level.first_error}")
    if failed:
        shown.caption = Text("\n".join(failed), style="red")
        shown.caption_justify = "left"
    return shown


def _number(value: float) -> str:
    """Writes a number with three digits, or as many as stand before the point."""
    if math.isnan(value):
        return "-"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a report; JSON knows no NaN, so null stands for what could not be measured."""
    path.write_text(json.dumps(_plain(content), indent=2) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Level):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def plot(path: Path, levels: Sequence[Level], title: str) -> None:
    """Draws throughput, time to the first token and time between tokens over the concurrency.

    Raises BenchError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullLocator
    except ImportError:
        raise BenchError(
            "the plot needs matplotlib: pip install 'mixtral-jax[bench]', or leave out --plot"
        ) from None
    ordered = sorted(levels, key=lambda level: level.concurrency)
    clients = [level.concurrency for level in ordered]
    figure = Figure(figsize=(12, 4), layout="constrained")
    throughput, ttft, itl = figure.subplots(1, 3)
    rates = [level.tokens_per_second for level in ordered]
    throughput.plot(clients, rates, marker="o", color="tab:green")
    for x, y in zip(clients, rates, strict=True):
        throughput.annotate(f"{y:,.0f}", (x, y), (0, 6), textcoords="offset points", ha="center")
    throughput.set_title("throughput, tokens/s")
    for axes, name in ((ttft, "ttft"), (itl, "itl")):
        shades = zip(PERCENTILES, ("tab:blue", "tab:orange", "tab:red"), strict=True)
        for percent, color in shades:
            times = [getattr(level, name)[f"p{percent}"] * 1000 for level in ordered]
            axes.plot(clients, times, marker="o", color=color, label=f"p{percent}")
        axes.legend(frameon=False)
    ttft.set_title("time to first token, ms")
    itl.set_title("time between tokens, ms")
    for axes in (throughput, ttft, itl):
        axes.set_xscale("log", base=2)
        axes.set_xticks(clients)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_xlabel("clients at once")
        axes.margins(x=0.1, y=0.12)
        axes.autoscale()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
