"""`make settings-table`: the settings that `serve` chooses, by chip and model, by arithmetic.

One row for each chip, model and dtype: on the smallest slice that holds eight sequences of 2,048
tokens, by the best split there, what `settings_by_chip` gives, the longest context that then fits,
and the estimated tokens a second of 1, 8, 32 and 128 sequences of 2,048 tokens. Written into
docs/numbers.md between `<!-- settings: ... -->` and `<!-- end of settings -->`. Needs no compiler.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.command import run, write_between
from mixtral_jax.planning.search import Search, known_model
from mixtral_jax.roofline.chips import Topology, topologies
from mixtral_jax.roofline.settings import (
    TYPICAL_CONTEXT,
    StepSettings,
    context_that_fits,
    estimate_of,
    settings_by_chip,
    split_placement,
    step_buckets,
)
from mixtral_jax.roofline.split import Split
from mixtral_jax.roofline.workload import Workload, unsplit_placement

NUMBERS = Path(__file__).parent.parent / "docs" / "numbers.md"
BEGIN, END = "<!-- settings: make settings-table -->\n", "<!-- end of settings -->"
MODELS = {
    "Mistral-7B": "mistral-7b-instruct-v0.3",
    "Mixtral-8x7B": "mixtral-8x7b-instruct-v0.1",
    "Mixtral-8x22B": "mixtral-8x22b-instruct-v0.1",
}
CHIPS = (
    *("tpu:v5e", "tpu:v5p", "tpu:v6e", "tpu:v7x"),
    *("gpu:a100-80", "gpu:h100", "gpu:b200", "gpu:l4", "gpu:rtx4090"),
)
DTYPES = ("bfloat16", "int8")
BATCHES = (1, 8, 32, 128)
_LEAST_BATCH = 8
HEAD = (
    "| model | weights | on | split | sequences | step tokens | buckets | page | keys, values | "
    "context that fits | tokens/s at 1 | 8 | 32 | 128 |\n|" + "---|" * 14
)


def workload_for(model: str, dtype: str, platform: str) -> Workload:
    """The workload by which a slice and a split are chosen."""
    return Workload(
        model=known_model(model),
        dtype=dtype,
        kv_dtype=None,
        batch=_LEAST_BATCH,
        context=TYPICAL_CONTEXT,
        prefill_tokens=1,
        page_size=unsplit_placement(dtype, platform).page_size,
    )


def place(workload: Workload, chips: str) -> tuple[Topology, Split] | None:
    """The smallest slice that holds a workload, with its best split; None where none does."""
    search = Search(workload, "auto", False, 1, lambda line: None, compiles=False)
    best = search.best_of(topologies(chips), lambda line: None)[0]
    return (best.topology, best.split) if best.fits else None


def chosen(workload: Workload, topology: Topology, split: Split) -> StepSettings:
    """The settings of a row."""
    placement = split_placement(workload, topology, split)
    return settings_by_chip(workload.model, placement, topology.chip)


def row(title: str, dtype: str, chips: str) -> str | None:
    """A row of the table; None where no slice of the chip holds the model."""
    workload = workload_for(MODELS[title], dtype, chips.partition(":")[0])
    smallest = place(workload, chips)
    if smallest is None:
        print(f"{title} in {dtype} fits on no slice of {chips}", file=sys.stderr)
        return None
    topology, split = smallest
    settings = chosen(workload, topology, split)
    placement = split_placement(workload, topology, split)
    model, chip, groups = workload.model, topology.chip, placement.num_sequence_groups
    rates = []
    for batch in BATCHES:
        rows = min(batch, settings.max_sequences)
        estimate = estimate_of(model, placement, chip, settings, rows)
        of_group = estimate.sequences
        step = estimate.seconds(of_group, of_group, estimate.workload.attended_tokens)
        rates.append(f"{rows / step.total:,.0f}")
    sizes = settings.max_sequences // groups, settings.max_step_tokens // groups
    cells = [
        title,
        dtype,
        f"`{topology}`",
        f"`{split}{' --dp-attention' if split.dp_attention else ''}`",
        f"{settings.max_sequences}",
        f"{settings.max_step_tokens:,}",
        " ".join(map(str, step_buckets(*sizes, few=placement.kernels.whole_step))),
        f"{settings.page_size}",
        settings.kv_dtype,
        f"{context_that_fits(model, placement, chip, settings):,}",
        *rates,
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
    """Write the settings that serve chooses for every chip and model."""
    rows = [
        line
        for title in models.split(",")
        for dtype in dtypes.split(",")
        for chip in chips.split(",")
        if (line := row(title, dtype, chip)) is not None
    ]
    table = "\n".join([HEAD, *rows])
    print(table)
    if not only_print:
        write_between(NUMBERS, BEGIN, END, table)


if __name__ == "__main__":
    run(main, "benchmarks.settings_table")
