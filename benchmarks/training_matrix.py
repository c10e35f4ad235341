"""`make training-matrix`: compiles full-size training steps for chips, and writes their memory.

One row for each run: bytes a chip of the step, whether they fit, and which layers were compiled.
Written into docs/numbers.md between `<!-- training: ... -->` and `<!-- end of training -->`.
Compilers for TPU and GPU must be installed (extras `plan` and `plan-gpu`); rows of a missing one
stay as they are in the file. Minutes each.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.command import run
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.planning.compiler_process import CompileError
from mixtral_jax.planning.search import known_model
from mixtral_jax.planning.topology import installed
from mixtral_jax.planning.training_plan import TrainingJob, TrainingPlan, plan_training
from mixtral_jax.roofline.chips import GIB, topologies
from mixtral_jax.training.config import TrainingConfig

NUMBERS = Path(__file__).parent.parent / "docs" / "numbers.md"
BEGIN, END = "<!-- training: make training-matrix -->\n", "<!-- end of training -->"
MODELS = {
    "Mistral-7B": "mistral-7b-instruct-v0.3",
    "Mixtral-8x7B": "mixtral-8x7b-instruct-v0.1",
    "Mixtral-8x22B": "mixtral-8x22b-instruct-v0.1",
}
LENGTH = 2048
HEAD = (
    "| run | on | split | rows | trained, with moments | frozen | temporaries | program | sum | "
    "of | a layer adds, MiB: temporaries, of them input and gradient | compiled |\n|" + "---|" * 12
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A row of the table: a model, how it is trained, and where."""

    model: str
    dtype: str
    topology: str
    is_full: bool = False
    mesh: str = "auto"
    rows: int = 1

    @property
    def title(self) -> str:
        """The first two cells, by which a row is found again."""
        trained = "whole" if self.is_full else "LoRA, rank 16"
        return f"| {self.model} {self.dtype}, {trained} | `{self.topology}` |"

    def job(self, whole: bool | None) -> TrainingJob:
        """The step of this run."""
        return TrainingJob(
            model=known_model(MODELS[self.model]),
            dtype=self.dtype,
            topology=self.topology,
            mesh=self.mesh,
            training=TrainingConfig(
                adapter=None if self.is_full else AdapterConfig(rank=16),
                steps=1000,
                rows=self.rows,
                length=LENGTH,
            ),
            whole=whole,
        )


RUNS = (
    Run(model="Mistral-7B", dtype="int8", topology="tpu:v5e:1x1"),
    Run(model="Mistral-7B", dtype="int8", topology="gpu:l4:1"),
    Run(model="Mistral-7B", dtype="bfloat16", topology="gpu:rtx4090:1"),
    Run(model="Mixtral-8x7B", dtype="int8", topology="tpu:v5e:2x4"),
    Run(model="Mixtral-8x7B", dtype="int8", topology="tpu:v5p:2x2x1"),
    Run(model="Mixtral-8x7B", dtype="int8", topology="gpu:h100:8"),
    Run(model="Mixtral-8x22B", dtype="int8", topology="tpu:v5p:2x2x1"),
    Run(model="Mixtral-8x22B", dtype="int8", topology="tpu:v5e:4x4", rows=2),
    Run(
        model="Mistral-7B",
        dtype="bfloat16",
        topology="tpu:v5p:2x2x1",
        is_full=True,
        mesh="data=4,expert=1,tensor=1",
        rows=4,
    ),
)


def row(run: Run, plan: TrainingPlan) -> str:
    """The row of the table for a plan."""
    memory, layer = plan.memory, plan.layer
    sizes = (
        *(memory.state_bytes, memory.frozen_bytes, memory.temporary_bytes, memory.program_bytes),
        *(memory.total_bytes, plan.chip_bytes),
    )
    cells = [f"{size / GIB:.2f}" for size in sizes]
    cells[4] += "" if plan.fits else ", does not fit"
    added = "-"
    if layer is not None:
        parts = (layer.temporary_bytes, layer.residual_bytes, layer.gradient_bytes)
        added = "{:.1f}, {:.1f} and {:.1f}".format(*(size / (1 << 20) for size in parts))
    how = "all layers" if plan.method == "compiled" else plan.method.removeprefix("compiled with ")
    named = [f"`{plan.mesh}`", f"{run.rows} of {LENGTH:,}", *cells, added, how]
    return " ".join((run.title, " | ".join(named), "|"))


def main(
    only: Annotated[str, typer.Option(help="A part of the titles of rows to compile.")] = "",
    whole: Annotated[
        bool | None,
        typer.Option(help="All layers; default: where it is likely to end in minutes."),
    ] = None,
    only_print: Annotated[
        bool, typer.Option("--print", help="Leave docs/numbers.md as it is.")
    ] = False,
) -> None:
    """Compile full-size training steps for chips."""
    before, rest = NUMBERS.read_text(encoding="utf-8").split(BEGIN)
    old, after = rest.split(END)
    lines, failures = [], []
    for planned in RUNS:
        kept = [line for line in old.splitlines() if line.startswith(planned.title)]
        if only not in planned.title or not installed(topologies(planned.topology)[0].platform):
            lines += kept
            continue
        try:
            plan = plan_training(
                planned.job(whole), lambda line: print(f"  {line}", file=sys.stderr)
            )
        except CompileError as error:
            failures.append(f"{planned.title} {error}")
            lines += kept
            continue
        lines.append(row(planned, plan))
        print(lines[-1], f"{plan.seconds:.0f} s", file=sys.stderr)
    table = "\n".join([HEAD, *lines])
    print(table)
    if not only_print:
        NUMBERS.write_text(f"{before}{BEGIN}{table}\n{END}{after}", encoding="utf-8")
    if failures:
        sys.exit("\n".join(["these do not compile:", *failures]))


if __name__ == "__main__":
    run(main, "benchmarks.training_matrix")
