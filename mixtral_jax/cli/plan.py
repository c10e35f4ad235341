"""`mixtral-jax plan`: whether chips hold a model, how to split it, and how fast it may be."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from mixtral_jax.errors import UserError
from mixtral_jax.roofline.chips import GIB, topologies

_PREFILL_TOKENS = 2048  # to compare splits by

if TYPE_CHECKING:
    from mixtral_jax.config import ModelConfig
    from mixtral_jax.placement import WeightDtypes
    from mixtral_jax.planning.plan import Plan
    from mixtral_jax.roofline.settings import StepSettings


def plan(
    topology: Annotated[
        str,
        typer.Option(
            help="tpu:v5e:2x4, tpu:v5p:2x2x1, tpu:v6e:2x4, gpu:h100:8, gpu:a100-80:4, ...; or "
            "tpu:v5e for its smallest slice that holds the load."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Name of a published model, such as mixtral-8x7b-instruct-v0.1."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder instead; only its config is read.")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "int8", "int4", "fp8", "float32"] | None,
        typer.Option(help="Type of the weights; default: as stored, bfloat16 for --model."),
    ] = None,
    kv_dtype: Annotated[
        Literal["int8", "fp8"] | None,
        typer.Option(help="Type of keys and values, as `serve` takes it."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 32,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each sequence.")] = 2048,
    prefill_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a step that takes in prompts; default: what `serve` chooses."
        ),
    ] = None,
    mesh: Annotated[
        str, typer.Option(help="Split, such as data=1,expert=8,tensor=1, or auto: the best split.")
    ] = "auto",
    dp_attention: Annotated[
        bool,
        typer.Option("--dp-attention", help="With --mesh: split sequences over `expert`."),
    ] = False,
    tries: Annotated[
        int, typer.Option(min=1, help="Splits to compile before the best is named.")
    ] = 3,
    price: Annotated[
        float | None, typer.Option(min=0, help="Price of all chips together for an hour.")
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Estimate by arithmetic alone, without a compiler.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    png: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="PNG file for a plot over the batch; needs the extra plan."
        ),
    ] = None,
) -> None:
    """Compile the serving step for chips that are not here: does it fit, and how fast is it?

    TPUs need libtpu, GPUs the CUDA plugins of jax (the extras `plan` and `plan-gpu`); without them
    the answer is arithmetic, and says so. Speeds are estimates: nothing runs.
    """
    from mixtral_jax.placement import dtype_counts
    from mixtral_jax.planning.search import Search
    from mixtral_jax.roofline.settings import settings_for_split
    from mixtral_jax.roofline.workload import Workload, unsplit_placement
    from mixtral_jax.weight import is_quantized

    sizes = topologies(topology)
    config, stored, weight_dtypes = _model(model, checkpoint)
    if (
        dtype is not None
        and stored is not None
        and (is_quantized(dtype) or is_quantized(stored))
        and dtype != stored
    ):
        raise UserError(
            f"{checkpoint} is stored as {stored}; to plan for {dtype}, convert the weights with "
            f"--dtype {dtype}, or give --model"
        )
    weight_type = dtype or stored or "bfloat16"
    placement = unsplit_placement(weight_type, sizes[0].platform, weight_dtypes)
    workload = Workload(
        model=config,
        dtype=placement.dtype,
        kv_dtype=None if kv_dtype is None else placement.checked_kv_dtype(kv_dtype, config),
        batch=batch,
        context=context,
        prefill_tokens=prefill_tokens or _PREFILL_TOKENS,
        page_size=placement.page_size,
        weight_dtypes=weight_dtypes,
    )
    # A notebook asks for colours (FORCE_COLOR) and is no terminal.
    notes = Console(stderr=True, highlight=False, force_terminal=sys.stderr.isatty())

    def note(line: str) -> None:
        notes.print(line, markup=False)

    by_chip = prefill_tokens is None
    search = Search(workload, mesh, dp_attention, tries, note, not estimate, by_chip)
    with notes.status("planning") as status:
        answers = search.best_of(sizes, status.update)
    settings = settings_for_split(workload, answers[0].topology, answers[0].split)
    if png is not None:
        _draw(png, answers[0], model or str(checkpoint))
    if as_json:
        report = answers[0].to_json(price)
        report["model"] = {"name": model or str(checkpoint), "dtype": workload.dtype}
        if weight_dtypes:
            report["model"]["weight_dtypes"] = dtype_counts(weight_dtypes)
        prefill = answers[0].workload.prefill_tokens
        report["load"] = {"batch": batch, "context": context, "prefill": prefill}
        report["settings"] = vars(settings)
        report["others"] = [_short(plan) for plan in answers[1:]]
        print(json.dumps(report, indent=2))
    else:
        _show(answers, settings, model or str(checkpoint), price)


def _model(name: str | None, folder: Path | None) -> "tuple[ModelConfig, str | None, WeightDtypes]":
    """Returns the config, the dtype that the weights are stored as, and those of single ones."""
    from mixtral_jax.planning.search import known_model

    if (name is None) == (folder is None):
        raise UserError("give either --model NAME or --checkpoint FOLDER")
    if folder is not None:
        from mixtral_jax.checkpoint.folder import Card

        card = Card.read(folder)
        return card.model, card.dtype, card.weight_dtypes
    return known_model(str(name)), None, ()


def _short(answer: "Plan") -> dict[str, object]:
    kept = ("method", "mesh", "dp_attention", "fits", "ms_per_decode_step", "tokens_per_second")
    report = answer.to_json()
    return {name: report[name] for name in (*kept, "bound", "bytes_per_chip")}


def _show(answers: "list[Plan]", settings: "StepSettings", name: str, price: float | None) -> None:
    from mixtral_jax.placement import precision_text

    best = answers[0]
    workload, chip = best.workload, best.topology.chip
    report = best.to_json(price)
    out = Console(width=max(100, Console().width), highlight=False)
    verdict = "fits" if best.fits else "does NOT fit"
    precision = precision_text(workload.dtype, workload.weight_dtypes)
    out.print(
        f"{name} in {precision} on {best.topology} ({best.topology.chips} x {chip.name}): "
        f"{verdict}\n{workload.batch} sequences of {workload.context:,} tokens; split "
        f"{_named(best)}; memory {_source(best)}, all speeds are estimates\n"
    )
    memory = Table("a chip", "GiB", title_justify="left", box=None)
    for kind, nbytes in report["bytes_per_chip"].items():
        memory.add_row(kind, f"{nbytes / GIB:.2f}")
    out.print(memory)
    out.print(
        f"\nlongest context at this batch   {best.longest_context:,} tokens\n"
        f"largest batch at this context   {best.largest_batch:,} sequences\n"
    )
    resources = ("memory", "compute", "network", "launch")
    speed = Table("", "ms", *resources, "bound", "tokens/s", box=None)
    for what, step, rate in (
        ("decode step", best.decode, best.tokens_per_second),
        (f"prefill of {workload.prefill_tokens:,}", best.prefill, best.prefill_tokens_per_second),
    ):
        spent = [f"{getattr(step, name) * 1e3:.2f}" for name in resources]
        speed.add_row(what, f"{step.total * 1e3:.2f}", *spent, step.bound, f"{rate:,.0f}")
    out.print(speed)
    moves = "yes" if report["collectives_move_weights"] else "no"
    out.print(
        f"\nbytes moved by a decode step    {best.decode_bytes / 1e9:.2f} GB a chip, "
        f"{report['bytes_over_least']:.2f} of the least possible\n"
        f"collectives a layer             {_collectives(best)}; weights among them: {moves}"
    )
    if best.fits:
        out.print("\nwhat serve chooses where no flag says otherwise")
        for line in settings.lines:
            out.print(f"  {line}")
    if price is not None:
        out.print(f"a million tokens                {best.cost(price):.2f} at {price:g} an hour")
    if len(answers) > 1:
        others = Table("other splits", "fits", "GiB a chip", "decode ms", "tokens/s", "", box=None)
        for plan in answers[1:6]:
            others.add_row(
                _named(plan),
                "yes" if plan.fits else "no",
                f"{plan.total_bytes / GIB:.2f}",
                f"{plan.decode.total * 1e3:.2f}",
                f"{plan.tokens_per_second:,.0f}",
                plan.method,
            )
        out.print()
        out.print(others)


def _named(answer: "Plan") -> str:
    return f"{answer.split}{' --dp-attention' if answer.split.dp_attention else ''}"


def _source(answer: "Plan") -> str:
    return "by the compiler" if answer.method == "compiled" else "by arithmetic"


def _collectives(answer: "Plan") -> str:
    texts = [f"{item.kind} {item.nbytes / 1024:,.1f} KiB" for item in answer.layer_collectives]
    return ", ".join(texts) or "none"


def _draw(file: Path, answer: "Plan", name_of_model: str) -> None:
    """Plots the time of a decode step and tokens/s over the batch, and marks the answer."""
    from dataclasses import replace

    from mixtral_jax.planning.plan import plan_by_arithmetic

    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "--png needs matplotlib: pip install 'mixtral-jax[plan]', or leave it out"
        ) from None
    groups = answer.estimate.num_groups
    top = max(answer.workload.batch, answer.largest_batch, 1)
    batches = sorted({groups * 2**i for i in range(20) if groups * 2**i <= top} | {top})
    points = [
        plan_by_arithmetic(replace(answer.workload, batch=batch), answer.topology, answer.split)
        for batch in batches
    ]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    time_axes, speed_axes = figure.subplots(1, 2)
    for resource in ("memory", "compute", "network", "launch"):
        values = [getattr(plan.decode, resource) * 1e3 for plan in points]
        time_axes.plot(batches, values, label=resource, linestyle="--")
    for axes, name, value in (
        (time_axes, "decode step, ms", lambda plan: plan.decode.total * 1e3),
        (speed_axes, "tokens/s", lambda plan: plan.tokens_per_second),
    ):
        axes.plot(batches, [value(plan) for plan in points], label="by arithmetic", color="black")
        asked = f"batch {answer.workload.batch}, {_source(answer)}"
        axes.plot([answer.workload.batch], [value(answer)], "o", label=asked, color="tab:red")
        if answer.largest_batch:
            axes.axvline(answer.largest_batch, color="gray", linestyle=":", label="memory is full")
        axes.set_xscale("log", base=2)
        ticks = [batch for batch in batches if batch == top or batch * 1.4 < top]
        axes.set_xticks(ticks, labels=[f"{batch:,}" for batch in ticks])
        axes.minorticks_off()
        axes.set(xlabel="batch", title=name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(*time_axes.get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.suptitle(
        f"estimate: {name_of_model} in {answer.workload.dtype}, "
        f"context {answer.workload.context:,}, {answer.topology}, {_named(answer)}"
    )
    figure.savefig(file, dpi=120)
