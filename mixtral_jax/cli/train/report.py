"""Report: what is said before a run begins, and the lines and the bar while it goes on."""

import time
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mixtral_jax.checkpoint.parameters import count_parameters
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.adapter import Adapter
from mixtral_jax.roofline.chips import chip_of
from mixtral_jax.training.config import TrainingConfig
from mixtral_jax.training.dataset import Account
from mixtral_jax.training.packing import PackedData, PairedData
from mixtral_jax.training.records import (
    CheckpointRecord,
    Record,
    SampleRecord,
    StepRecord,
    ValidationRecord,
)
from mixtral_jax.training.step.program import TrainingMemory

_KINDS = {
    **dict.fromkeys(("q", "k", "v", "o"), "attention"),
    "router": "router",
    **dict.fromkeys(("gate", "up", "down"), "feed-forward"),
}
_SHOWN = 400  # characters of a question or an answer
_LINES_EVERY = 10.0  # seconds, where there is no terminal for a bar


def data_table(account: Account, data: PackedData | PairedData, config: TrainingConfig) -> Table:
    """Returns what the data set holds and how it is packed."""
    table = _table()
    table.add_row("rows", f"{account.rows:,}, of which {len(account.bad_rows):,} are left out")
    has_pairs = config.objective == "preference"
    lines = f"{account.examples:,}"
    if has_pairs:
        lines = f"{account.examples // 2:,} pairs of a preferred answer and another one"
    for count, reason in (
        (account.split_chats, "chats have examples of their own for some answers"),
        (account.truncated, "are cut to the length"),
        (account.dropped, "were too long and are left out"),
    ):
        if count:
            lines += f"; {count:,} {reason}"
    table.add_row("examples", lines)
    table.add_row("tokens", f"{account.tokens:,}, {account.target_share:.1%} are learnt")
    used = f"of {data.length:,}, {data.share_used:.1%} of positions used"
    if has_pairs:
        table.add_row("packing", f"none: each answer has a row {used}; beta {config.beta:g}")
    else:
        table.add_row("packing", f"{data.num_rows:,} rows {used}")
    assert config.steps is not None
    epochs = config.steps / data.num_steps
    table.add_row(
        "steps",
        f"{config.steps:,} of {config.rows} {'pairs' if has_pairs else 'rows'} in "
        f"{config.micro_batches} micro-batches: "
        f"{epochs:.2f} epochs of {data.num_steps:,}",
    )
    return table


def program_table(
    trained: Any, memory: TrainingMemory, model: ModelConfig, seconds: float
) -> Table:
    """Returns what is trained, and the bytes that the compiled step takes on a device.

    Args:
        trained: the trained arrays.
        memory: of the compiled step.
        model: the config.
        seconds: that compiling took.
    """
    table = _table()
    total = count_parameters(model, "float32")[0]
    counts = trained_by_kind(trained)
    count = sum(counts.values())
    kinds = ", ".join(f"{kind} {number:,}" for kind, number in counts.items())
    table.add_row("trained", f"{count:,} parameters, {count / total:.2%} of the model's: {kinds}")
    table.add_row(
        "memory",
        f"{_gib(memory.total_bytes)} a device: frozen {_gib(memory.frozen_bytes)}, trained with "
        f"moments {_gib(memory.state_bytes)}, temporary {_gib(memory.temporary_bytes)}",
    )
    table.add_row("compiled", f"in {seconds:.0f} s")
    return table


def trained_by_kind(trained: Any) -> dict[str, int]:
    """Returns the number of trained parameters of each kind of weight."""
    counts: dict[str, int] = {}
    if isinstance(trained, Adapter):
        for block in trained.layers:
            for name, low in block._asdict().items():
                if low is not None:
                    kind = _KINDS[name]
                    counts[kind] = counts.get(kind, 0) + low.a.size + low.b.size
        return counts
    return {"all": sum(array.size for array in trained.values())}


def print_answers(console: Console, asked: str, expected: str, answers: Mapping[str, str]) -> None:
    """Prints a question, the answer that is expected, and those that models gave, by a name."""
    lines = {"asked": asked, "expected": expected, **answers}
    for name, text in lines.items():
        shown = text if len(text) <= _SHOWN else f"... {text[-_SHOWN:]}"
        # A terminal acts on control characters, and a model may write any.
        shown = "".join(
            c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in shown
        )
        console.print(f"[bold]{name:8}[/bold]", end=" ")
        console.print(shown, markup=False, highlight=False)


class Progressing:
    """Shows records as they come: a bar on a terminal, else a line every few seconds.

    Args:
        console: where it is shown.
        config: of the run.
        step: that the run goes on from.
        flops: operations of a step over all devices, for the utilisation.
    """

    def __init__(self, console: Console, config: TrainingConfig, step: int, flops: float) -> None:
        assert config.steps is not None
        self._console = console
        self._steps = steps = config.steps
        self._has_pairs = config.objective == "preference"
        self._flops = flops
        self._peak = _peak()
        self._validation = ""
        self._next_line = 0.0
        self._first = step + 1
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=step, figures="")

    def __enter__(self) -> "Progressing":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, record: Record) -> None:
        """Shows a record."""
        match record:
            case StepRecord():
                if record.step == self._first and record.step < self._steps:
                    self._print(self._remaining(record))
                figures = self._figures(record)
                self._bar.update(self._task, completed=record.step, figures=figures)
                now = time.monotonic()
                is_due = now >= self._next_line or record.step == self._steps
                if not self._console.is_terminal and is_due:
                    self._next_line = now + _LINES_EVERY
                    self._print(f"step {record.step}/{self._steps}: {figures}")
                if record.is_skipped:
                    self._print(
                        f"step {record.step} changes nothing: its loss or gradient is not finite "
                        f"({record.skipped} such steps so far)"
                    )
            case ValidationRecord():
                self._validation = f", validation {record.loss:.4f}"
                pairs = self._of_pairs(record)
                self._print(f"step {record.step}: validation loss {record.loss:.4f}{pairs}")
            case SampleRecord() if record.step < self._steps:  # those of the end come later
                print_answers(
                    self._console, record.asked, record.expected, {"answered": record.answered}
                )
            case CheckpointRecord():
                pass

    def _remaining(self, record: StepRecord) -> str:
        """Returns the time that the other steps take, if they take what the first one took."""
        count = self._steps - record.step
        return (
            f"time       about {duration(count * record.seconds)} for {count:,} more steps, by the "
            f"first one's {record.seconds:.3g} s; validation and checkpoints come on top"
        )

    def _of_pairs(self, record: StepRecord | ValidationRecord) -> str:
        if not self._has_pairs:
            return ""
        return f", reward margin {record.margin:.4f}, accuracy {record.accuracy:.0%}"

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _figures(self, record: StepRecord) -> str:
        rate = record.tokens / record.seconds
        pairs = self._of_pairs(record)
        text = f"loss {record.loss:.4f}{pairs}{self._validation}, {rate:,.0f} tokens/s"
        if self._peak:
            share = self._flops / (record.seconds * self._peak * jax.device_count())
            text += f", MFU {share:.1%}"
        return text


def _peak() -> float:
    """Returns the device's peak operations a second in bfloat16; 0 where it is not known."""
    device = jax.devices()[0]
    chip = chip_of(device.platform, device.device_kind)
    return 0.0 if chip is None else chip.bf16


def _table() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def duration(seconds: float) -> str:
    """Returns a time such as 40 s, 12 min, 3.5 h or 2.1 days."""
    for unit, size, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
