"""`make plan-matrix`: compiles the full-size models for slices of every chip that hold them.

One row for each model and chip: the smallest slice that holds 32 sequences of 2,048 tokens, what
its memory is taken by, and which kernels are in the programs. Written into docs/numbers.md between
`<!-- plan: ... -->` and `<!-- end of plan -->`. Compilers for TPU and GPU must be installed (extras
`plan` and `plan-gpu`); rows of a missing one are left out. About a minute each.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.command import run, write_between
from mixtral_jax.planning.plan import Plan
from mixtral_jax.planning.search import Search, known_model
from mixtral_jax.planning.topology import installed
from mixtral_jax.roofline.chips import GIB, topologies
from mixtral_jax.roofline.workload import Workload, unsplit_placement

NUMBERS = Path(__file__).parent.parent / "docs" / "numbers.md"
BEGIN, END = "<!-- plan: make plan-matrix -->\n", "<!-- end of plan -->"
MODELS = {
    "Mistral-7B": "mistral-7b-instruct-v0.3",
    "Mixtral-8x7B": "mixtral-8x7b-instruct-v0.1",
    "Mixtral-8x22B": "mixtral-8x22b-instruct-v0.1",
}
CHIPS = ("tpu:v5e", "tpu:v5p", "tpu:v6e", "gpu:h100:8")
DTYPES = ("bfloat16", "int8")
BATCH, CONTEXT, PREFILL_TOKENS = 32, 2048, 2048
HEAD = (
    "| model | weights | on | split | weights, GiB a chip | pages | temporaries, programs | "
    "of | decode step, ms (estimate) | kernels |\n|" + "---|" * 10
)


def row(title: str, dtype: str, chips: str) -> str | None:
    """Raises RuntimeError if nothing compiles or fits."""
    sizes = topologies(chips)
    if not installed(sizes[0].platform):
        print(f"no compiler for {sizes[0].platform}: {chips} is left out", file=sys.stderr)
        return None
    workload = Workload(
        model=known_model(MODELS[title]),
        dtype=dtype,
        kv_dtype=None,
        batch=BATCH,
        context=CONTEXT,
        prefill_tokens=PREFILL_TOKENS,
        page_size=unsplit_placement(dtype, sizes[0].platform).page_size,
    )

    def note(line: str) -> None:
        print(f"  {line}", file=sys.stderr)

    start = time.monotonic()
    search = Search(workload, "auto", False, 1, note, compiles=True)
    best = search.best_of(sizes, lambda line: None)[0]
    took = time.monotonic() - start
    print(f"{title} {dtype} {best.topology}: {best.method}, {took:.0f} s", file=sys.stderr)
    if best.report is None or not best.fits:
        raise RuntimeError(f"{title} in {dtype} on {chips}: {best.method}, fits: {best.fits}")
    return _row(title, best)


def _row(title: str, best: Plan) -> str:
    assert best.report is not None
    kernels = {**best.report.decode.kernels, **best.report.prefill.kernels}
    named = f"`{best.split}{' --dp-attention' if best.split.dp_attention else ''}`"
    sizes = [best.weight_bytes, best.cache_bytes, best.temporary_bytes + best.program_bytes]
    cells = [
        title,
        best.workload.dtype,
        f"`{best.topology}`",
        named,
        *(f"{size / GIB:.2f}" for size in sizes),
        f"{best.topology.chip.memory / GIB:.2f}",
        f"{best.decode.total * 1e3:.1f}, {best.decode.bound}",
        ", ".join(sorted(kernels)) or "none",
    ]
    return "| " + " | ".join(cells) + " |"


def main(
    models: Annotated[str, typer.Option(help="Models, with commas between.")] = ",".join(MODELS),
    chips: Annotated[str, typer.Option(help="Chips, with commas between.")] = ",".join(CHIPS),
    dtypes: Annotated[str, typer.Option(help="Types of weights.")] = ",".join(DTYPES),
    only_print: Annotated[
        bool, typer.Option("--print", help="Leave docs/numbers.md as it is.")
    ] = False,
) -> None:
    """Compile the full-size models for slices of every chip that hold them."""
    rows, failures = [], []
    for title in models.split(","):
        for dtype in dtypes.split(","):
            for chip in chips.split(","):
                try:
                    line = row(title, dtype, chip)
                except RuntimeError as error:
                    failures.append(str(error))
                    continue
                rows += [line] if line else []
    table = "\n".join([HEAD, *rows])
    print(table)
    if not only_print:
        write_between(NUMBERS, BEGIN, END, table)
    if failures:
        sys.exit("\n".join(["these do not compile or do not fit:", *failures]))


if __name__ == "__main__":
    run(main, "benchmarks.plan_matrix")
