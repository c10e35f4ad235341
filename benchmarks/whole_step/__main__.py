"""`python -m benchmarks.whole_step`: decode steps of full-size models, compiled as one program.

For each model and topology: the seconds to trace and to compile a decode step of 32 sequences as
TPU and GPU run it, how large the program is, whether the pages are written in place, and whether it
moves the bytes and runs the collectives that `mixtral-jax plan` counts from one compiled layer. One
row takes minutes; compilers for TPU and GPU must be installed (extras `plan` and `plan-gpu`).
"""

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from benchmarks.command import run
from mixtral_jax.planning.compiler import CompileJob
from mixtral_jax.planning.compiler_process import report_of
from mixtral_jax.planning.plan import compile_job, plan_by_arithmetic
from mixtral_jax.planning.search import known_model
from mixtral_jax.roofline.chips import GIB, topologies
from mixtral_jax.roofline.split import Split
from mixtral_jax.roofline.workload import Workload, unsplit_placement
from mixtral_jax.sharding import mesh_sizes

ROWS = (
    "mistral-7b-instruct-v0.3 bfloat16 tpu:v5e:2x4 data=1,expert=1,tensor=8",
    "mixtral-8x7b-instruct-v0.1 bfloat16 tpu:v5e:2x4 data=1,expert=1,tensor=8",
    "mixtral-8x7b-instruct-v0.1 bfloat16 tpu:v5e:2x4 data=1,expert=8,tensor=1",
    "mixtral-8x22b-instruct-v0.1 int8 tpu:v5e:4x4 data=1,expert=8,tensor=2",
    "mistral-7b-instruct-v0.3 bfloat16 gpu:h100:1 data=1,expert=1,tensor=1",
    "mixtral-8x7b-instruct-v0.1 bfloat16 gpu:h100:8 data=1,expert=8,tensor=1",
    "mixtral-8x22b-instruct-v0.1 bfloat16 gpu:h100:8 data=1,expert=8,tensor=1",
)
HEAD = (
    "| model | weights | on | split | trace, s | compile, s | program, MiB | arguments, GiB a chip "
    "| pages in place, GiB | temporaries, GiB | bytes moved, GiB: one program | by layers | "
    "collectives |\n|" + "---|" * 13
)
BATCH, CONTEXT = 32, 2048


def job_of(name: str, dtype: str, chips: str, mesh: str) -> CompileJob:
    """The decode step of a row."""
    (topology,) = topologies(chips)
    workload = Workload(
        model=known_model(name),
        dtype=dtype,
        kv_dtype=None,
        batch=BATCH,
        context=CONTEXT,
        prefill_tokens=BATCH,
        page_size=unsplit_placement(dtype, topology.platform).page_size,
    )
    split = Split.of(workload.model, *mesh_sizes(mesh))
    return compile_job(plan_by_arithmetic(workload, topology, split))


def row(text: str) -> str:
    """Compiles a row of the table."""
    name, dtype, chips, mesh = text.split()
    job = job_of(name, dtype, chips, mesh)
    (topology,) = topologies(chips)
    note = report_of("benchmarks.whole_step.compiler", asdict(job), topology, lambda line: None)
    print(f"{text}: {note}", file=sys.stderr)
    same = note["collectives"] == note["planned"]
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(note["collectives"].items()))
    cells = [
        name,
        dtype,
        f"`{chips}`",
        f"`{mesh}`",
        f"{note['trace']:.0f}",
        f"{note['compile']:.0f}",
        f"{note['program'] / 2**20:.1f}",
        f"{note['arguments'] / GIB:.2f}",
        f"{note['alias'] / GIB:.2f} of {note['pages'] / GIB:.2f}",
        f"{note['temporaries'] / GIB:.3f}",
        f"{note['moved'] / GIB:.2f}",
        f"{note['moved_by_layers'] / GIB:.2f}",
        (counts or "none") + ("" if same else f" (planned: {note['planned']})"),
    ]
    return f"| {' | '.join(cells)} |"


def main(
    rows: Annotated[
        list[str] | None,
        typer.Argument(help='as "MODEL DTYPE CHIPS MESH"; all rows if none is given'),
    ] = None,
) -> None:
    """Prints the table."""
    print(HEAD)
    for text in rows or ROWS:
        print(row(text), flush=True)


if __name__ == "__main__":
    run(main, "benchmarks.whole_step")
