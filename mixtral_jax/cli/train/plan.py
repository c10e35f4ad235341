"""`mixtral-jax train --plan`: what a step of the run takes on chips that are not here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from mixtral_jax.cli.train.settings import read_settings
from mixtral_jax.errors import UserError
from mixtral_jax.roofline.chips import GIB, topologies

if TYPE_CHECKING:
    from mixtral_jax.config import ModelConfig
    from mixtral_jax.placement import WeightDtypes
    from mixtral_jax.planning.training_plan import TrainingJob, TrainingPlan

# In place of what a plan does not need: it reads no rows and writes no files.
_UNUSED = {"data": ["none.jsonl"], "output": "none"}
# Steps of a run whose settings give none; their number is in the program as a number only.
_STEPS = 1000


def check_plan_flags(plan: bool, topology: str | None, whole: bool, as_json: bool) -> None:
    """Raises UserError for flags of a plan without the others that they need."""
    if plan and topology is None:
        raise UserError("--plan needs --topology, such as --topology tpu:v5e:2x4")
    if not plan and (topology is not None or whole or as_json):
        name = "--topology" if topology is not None else "--whole" if whole else "--json"
        raise UserError(f"{name} is for --plan; give both, or leave it out")


def plan_run(
    file: Path | None,
    flags: Mapping[str, Any],
    changes: Sequence[str],
    *,
    is_full: bool,
    topology: str,
    is_whole: bool,
    as_json: bool,
) -> None:
    """Compiles the step of a run for a topology and prints what it takes; no weights are read.

    The first arguments are those of `read_settings`, where the model may be the name of a published
    one as well.

    Args:
        file: settings of the run.
        flags: take the place of settings.
        changes: texts NAME=VALUE.
        is_full: trains all parameters.
        topology: the chips.
        is_whole: compiles all layers, however long it takes.
        as_json: prints JSON in place of text.
    """
    from mixtral_jax.planning.topology import installed
    from mixtral_jax.planning.training_plan import plan_training

    platform = topologies(topology)[0].platform
    if not installed(platform):
        extra = "plan" if platform == "tpu" else "plan-gpu"
        raise UserError(
            f"no compiler for {platform} is installed: pip install 'mixtral-jax[{extra}]'"
        )
    name, job = job_of(file, flags, changes, is_full=is_full, topology=topology, is_whole=is_whole)
    with Console(stderr=True, highlight=False).status("planning") as status:
        plan = plan_training(job, status.update)
    if as_json:
        print(json.dumps({"model": name, "dtype": job.dtype, **plan.to_json()}, indent=2))
    else:
        Console(width=100, highlight=False, soft_wrap=True).print(text_of(name, job, plan))


def job_of(
    file: Path | None,
    flags: Mapping[str, Any],
    changes: Sequence[str],
    *,
    is_full: bool,
    topology: str,
    is_whole: bool,
) -> "tuple[str, TrainingJob]":
    """Returns the model's name and the job, of the arguments of `plan_run`."""
    from mixtral_jax.planning.training_plan import TrainingJob
    from mixtral_jax.weight import is_quantized

    known = {name: value for name, value in flags.items() if value is not None}
    settings = read_settings(file, {**_UNUSED, **known}, changes, is_full=is_full)
    training = settings.training
    if training.steps is None:
        training = replace(training, steps=training.warmup_steps + _STEPS, epochs=None)
    config, stored, weight_dtypes = _model(settings.model)
    dtype = settings.dtype or stored or "bfloat16"
    is_rounded = stored is not None and (is_quantized(dtype) or is_quantized(stored))
    if is_rounded and dtype != stored:
        raise UserError(
            f"{settings.model} is stored as {stored}; to plan for {dtype}, convert the weights "
            f"with --dtype {dtype}, or give the name of a published model"
        )
    job = TrainingJob(
        model=config,
        dtype=dtype,
        topology=topology,
        mesh=settings.mesh,
        training=training,
        whole=True if is_whole else None,
        weight_dtypes=weight_dtypes,
    )
    return settings.model, job


def _model(name: str) -> "tuple[ModelConfig, str | None, WeightDtypes]":
    """Returns the config of a folder or of a published model, and the stored dtypes of the first:
    of the model and of single weights.
    """
    from mixtral_jax.planning.search import known_model

    if Path(name).is_dir():
        from mixtral_jax.checkpoint.folder import Card

        card = Card.read(Path(name))
        return card.model, card.dtype, card.weight_dtypes
    return known_model(name), None, ()


def text_of(name: str, job: "TrainingJob", plan: "TrainingPlan") -> Table:
    """Returns the plan as lines of a table."""
    from mixtral_jax.placement import precision_text

    run, memory = job.training, plan.memory
    precision = precision_text(job.dtype, job.weight_dtypes)
    trained = "all parameters" if run.adapter is None else f"an adapter of rank {run.adapter.rank}"
    verdict = "fits" if plan.fits else "does NOT fit"
    lines = {
        "step": f"{trained} of {name} in {precision}: {run.rows} rows of {run.length:,} in "
        f"{run.micro_batches} micro-batches",
        "devices": f"{plan.topology}, {plan.mesh}",
        "memory a chip": f"{_gib(memory.total_bytes)} of {_gib(plan.chip_bytes)}: {verdict}",
        "  trained, with moments": _gib(memory.state_bytes),
        "  frozen": _gib(memory.frozen_bytes),
        "  temporary": _gib(memory.temporary_bytes),
        "  program": _gib(memory.program_bytes),
    }
    if plan.layer is not None:
        sizes = (plan.layer.temporary_bytes, plan.layer.residual_bytes, plan.layer.gradient_bytes)
        grown, kept, gradient = (f"{size / (1 << 20):.1f} MiB" for size in sizes)
        lines["a layer adds"] = (
            f"{grown} of temporaries; its input has {kept}, its gradient {gradient}"
        )
    lines["operations a step"] = f"{plan.step_flops:.3g} of the model, all chips together"
    lines["method"] = f"{plan.method}, in {plan.seconds:.0f} s"
    table = Table(box=None, show_header=False)
    for title, line in lines.items():
        table.add_row(title, line)
    return table


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"
