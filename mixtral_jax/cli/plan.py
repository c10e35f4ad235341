"""`mixtral-jax plan`: which chips hold a model, how it is best split, how fast it may be there."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from mixtral_jax.errors import UserError
from mixtral_jax.planning.chips import GIB, topologies

if TYPE_CHECKING:
    from mixtral_jax.config import ModelConfig
    from mixtral_jax.planning.plan import Plan


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
        Path | None, typer.Option(help="Or a checkpoint folder; only its config is read.")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "int8", "float32"] | None,
        typer.Option(help="Of the weights; default: as stored, bfloat16 for --model."),
    ] = None,
    kv_dtype: Annotated[
        Literal["int8"] | None, typer.Option(help="Of keys and values, as `serve` takes it.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 32,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 2048,
    prefill_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a step that takes in prompts.")
    ] = 2048,
    mesh: Annotated[
        str, typer.Option(help="data=1,expert=8,tensor=1, or auto: the best that is found.")
    ] = "auto",
    dp_attention: Annotated[
        bool,
        typer.Option("--dp-attention", help="With --mesh: split sequences over `expert`."),
    ] = False,
    tries: Annotated[
        int, typer.Option(min=1, help="Splits to compile before the best is named.")
    ] = 3,
    price: Annotated[
        float | None, typer.Option(min=0, help="Of all chips together, an hour.")
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="By arithmetic alone, at once, without a compiler.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    png: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw time against batch; needs the extra `plan`."),
    ] = None,
) -> None:
    """Compile the serving step for chips that are not here: does it fit, and how fast is it?

    TPUs need libtpu, GPUs the CUDA plugins of jax (the extras `plan` and `plan-gpu`); without them
    the answer is arithmetic, and says so. Speeds are estimates: nothing runs.
    """
    from mixtral_jax.planning.search import Search
    from mixtral_jax.planning.workload import Workload, unsplit_placement

    sizes = topologies(topology)
    config, stored = _model(model, checkpoint)
    if dtype is not None and stored is not None and "int8" in (dtype, stored) and dtype != stored:
        raise UserError(
            f"{checkpoint} is stored as {stored}; to plan for {dtype}, convert the weights with "
            f"--dtype {dtype}, or give --model"
        )
    placement = unsplit_placement(dtype or stored or "bfloat16", sizes[0].platform)
    placement.checked_kv_dtype(kv_dtype)
    workload = Workload(
        model=config,
        dtype=placement.dtype,
        kv_dtype=kv_dtype,
        batch=batch,
        context=context,
        prefill_tokens=prefill_tokens,
        page_size=placement.page_size,
    )
    notes = Console(stderr=True, highlight=False)

    def note(line: str) -> None:
        notes.print(line, markup=False)

    search = Search(workload, mesh, dp_attention, tries, note, compiles=not estimate)
    with notes.status("planning") as status:
        answers = search.best_of(sizes, status.update)
    if png is not None:
        _draw(png, answers[0], model or str(checkpoint))
    if as_json:
        found = answers[0].to_json(price)
        found["model"] = {"name": model or str(checkpoint), "dtype": workload.dtype}
        found["load"] = {"batch": batch, "context": context, "prefill": prefill_tokens}
        found["others"] = [_short(one) for one in answers[1:]]
        print(json.dumps(found, indent=2))
    else:
        _show(answers, model or str(checkpoint), price)


def _model(name: str | None, folder: Path | None) -> "tuple[ModelConfig, str | None]":
    """The config, and the dtype that it is stored as."""
    from mixtral_jax.planning.search import known_model

    if (name is None) == (folder is None):
        raise UserError("give either --model NAME or --checkpoint FOLDER")
    if folder is not None:
        from mixtral_jax.checkpoint.folder import Card

        card = Card.read(folder)
        return card.model, card.dtype
    return known_model(str(name)), None


def _short(answer: "Plan") -> dict[str, object]:
    kept = ("method", "mesh", "dp_attention", "fits", "ms_per_decode_step", "tokens_per_second")
    found = answer.to_json()
    return {name: found[name] for name in (*kept, "bound", "bytes_per_chip")}


def _show(answers: "list[Plan]", name: str, price: float | None) -> None:
    best = answers[0]
    workload, chip = best.workload, best.topology.chip
    found = best.to_json(price)
    out = Console(width=max(100, Console().width), highlight=False)
    verdict = "fits" if best.fits else "does NOT fit"
    out.print(
        f"{name} in {workload.dtype} on {best.topology} ({best.topology.chips} x {chip.name}): "
        f"{verdict}\n{workload.batch} sequences of {workload.context:,} tokens; split "
        f"{_named(best)}; memory {_source(best)}, all speeds are estimates\n"
    )
    memory = Table("a chip", "GiB", title_justify="left", box=None)
    for part, nbytes in found["bytes_per_chip"].items():
        memory.add_row(part, f"{nbytes / GIB:.2f}")
    out.print(memory)
    out.print(
        f"\nlongest context at this batch   {best.longest_context:,} tokens\n"
        f"largest batch at this context   {best.largest_batch:,} sequences\n"
    )
    speed = Table("", "ms", "memory", "compute", "network", "bound", "tokens/s", box=None)
    for what, step, rate in (
        ("decode step", best.decode, best.tokens_per_second),
        (f"prefill of {workload.prefill_tokens:,}", best.prefill, best.prefill_tokens_per_second),
    ):
        spent = [f"{part * 1e3:.2f}" for part in (step.memory, step.compute, step.network)]
        speed.add_row(what, f"{step.total * 1e3:.2f}", *spent, step.bound, f"{rate:,.0f}")
    out.print(speed)
    moves = "yes" if found["collectives_move_weights"] else "no"
    out.print(
        f"\nbytes moved by a decode step    {best.decode_bytes / 1e9:.2f} GB a chip, "
        f"{found['bytes_over_least']:.2f} of the least possible\n"
        f"collectives a layer             {_collectives(best)}; weights among them: {moves}"
    )
    if price is not None:
        out.print(f"a million tokens                {best.cost(price):.2f} at {price:g} an hour")
    if len(answers) > 1:
        others = Table("other splits", "fits", "GiB a chip", "decode ms", "tokens/s", "", box=None)
        for one in answers[1:6]:
            others.add_row(
                _named(one),
                "yes" if one.fits else "no",
                f"{one.total_bytes / GIB:.2f}",
                f"{one.decode.total * 1e3:.2f}",
                f"{one.tokens_per_second:,.0f}",
                one.method,
            )
        out.print()
        out.print(others)


def _named(answer: "Plan") -> str:
    return f"{answer.split}{' --dp-attention' if answer.split.dp_attention else ''}"


def _source(answer: "Plan") -> str:
    return "by the compiler" if answer.method == "compiled" else "by arithmetic"


def _collectives(answer: "Plan") -> str:
    said = [f"{one.kind} {one.nbytes / 1024:,.1f} KiB" for one in answer.layer_collectives]
    return ", ".join(said) or "none"


def _draw(file: Path, answer: "Plan", name_of_model: str) -> None:
    """Time of a decode step and tokens/s against batch: by arithmetic, and the one answered."""
    from dataclasses import replace

    from mixtral_jax.planning.plan import plan_by_arithmetic

    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "--png needs matplotlib: pip install 'mixtral-jax[plan]', or leave it out"
        ) from None
    parts = answer.estimate.num_groups
    top = max(answer.workload.batch, answer.largest_batch, 1)
    batches = sorted({parts * 2**i for i in range(20) if parts * 2**i <= top} | {top})
    points = [
        plan_by_arithmetic(replace(answer.workload, batch=batch), answer.topology, answer.split)
        for batch in batches
    ]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for part in ("memory", "compute", "network"):
        values = [getattr(one.decode, part) * 1e3 for one in points]
        left.plot(batches, values, label=part, linestyle="--")
    for axes, name, value in (
        (left, "decode step, ms", lambda one: one.decode.total * 1e3),
        (right, "tokens/s", lambda one: one.tokens_per_second),
    ):
        axes.plot(batches, [value(one) for one in points], label="by arithmetic", color="black")
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
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(
        f"estimate: {name_of_model} in {answer.workload.dtype}, "
        f"context {answer.workload.context:,}, {answer.topology}, {_named(answer)}"
    )
    figure.savefig(file, dpi=120)
