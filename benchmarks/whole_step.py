"""`python -m benchmarks.whole_step`: decode steps of full-size models, compiled as one program.

For each model and topology: the seconds to trace and to compile a decode step of 32 sequences as
TPU and GPU run it, how large the program is, whether the pages are written in place, and whether it
moves the bytes and runs the collectives that `mixtral-jax plan` counts from one compiled layer. One
row takes minutes; compilers for TPU and GPU must be installed (extras `plan` and `plan-gpu`).
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import jax
import typer

from benchmarks.command import run
from mixtral_jax.config import ModelConfig
from mixtral_jax.planning.compiler import CompileJob, abstract_model, compile_step
from mixtral_jax.planning.compiler_process import answer_job, report_of
from mixtral_jax.planning.plan import compile_job, plan_by_arithmetic
from mixtral_jax.planning.search import known_model
from mixtral_jax.planning.topology import absent_devices
from mixtral_jax.planning.traffic import program_traffic
from mixtral_jax.roofline.chips import GIB, topologies
from mixtral_jax.roofline.split import Split
from mixtral_jax.roofline.workload import Workload, unsplit_placement
from mixtral_jax.sharding import mesh_sizes
from mixtral_jax.step.inputs import StepSizes
from mixtral_jax.step.split_model import SplitModel
from mixtral_jax.step.whole_step import Kind, WholeSteps

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


def compiled(fields: dict[str, Any], progress: Any) -> dict[str, Any]:
    """In the other process: the whole step, and the layers that `plan` compiles."""
    job = CompileJob(**{**fields, "model": ModelConfig.from_json(fields["model"])})
    (topology,) = topologies(job.topology)
    devices: Sequence[jax.Device] = absent_devices(topology)
    model = abstract_model(job, devices)
    split = SplitModel.of(model)
    sizes = StepSizes(
        num_pages=job.num_pages,
        page_size=job.page_size,
        max_sequences=job.sequences,
        max_context=job.context,
    )
    pages = split.pages(job.num_pages, job.page_size, None)
    groups = None if model.layout is None else split.num_sequence_groups
    whole = WholeSteps(split, pages, sizes, groups, {job.sequences: job.sequences})
    progress("tracing")
    begun = time.monotonic()
    lowered = whole._lowered((Kind(), job.sequences))
    traced = time.monotonic()
    progress("compiling")
    program = lowered.compile()
    ended = time.monotonic()
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None and text is not None
    experts = job.model.num_experts // mesh_sizes(job.mesh)[1] if job.model.is_moe else 0
    traffic = program_traffic(text, job.decode_reads, experts)
    by_layers = compile_step(job, devices, progress).decode
    layers = job.model.num_layers
    planned = Counter(item.kind for item in by_layers.outer_collectives)
    for item in by_layers.layer_collectives:
        planned[item.kind] += layers
    held = pages.sharding.shard_shape(pages.shape) if pages.sharding else pages.shape
    page_bytes = layers * pages.dtype.itemsize
    for size in held:
        page_bytes *= size
    return {
        "trace": traced - begun,
        "compile": ended - traced,
        "program": memory.generated_code_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "pages": page_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "entries": text.count("\nENTRY "),
        "moved": traffic.nbytes,
        "moved_by_layers": by_layers.moved_bytes,
        "collectives": dict(Counter(item.kind for item in traffic.collectives)),
        "planned": dict(planned),
        "kernels": dict(traffic.kernels),
    }


def row(text: str) -> str:
    """Compiles a row of the table."""
    name, dtype, chips, mesh = text.split()
    job = job_of(name, dtype, chips, mesh)
    (topology,) = topologies(chips)
    note = report_of("benchmarks.whole_step", asdict(job), topology, lambda line: None)
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
    if len(sys.argv) == 1 and not sys.stdin.isatty():
        answer_job(compiled)  # as `report_of` starts it
    else:
        run(main, "benchmarks.whole_step")
