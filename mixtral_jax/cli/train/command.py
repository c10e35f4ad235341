"""`mixtral-jax train`: fine-tunes a model on files of chats or text."""

from pathlib import Path
from typing import Annotated

import typer

from mixtral_jax.cli import extras


@extras.needs("train")
def train(
    settings: Annotated[
        Path | None, typer.Option(help="YAML file of settings; flags take their place.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint folder, or tiny-random.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="JSONL file of rows to train on, or FILE:TIMES an epoch; repeatable."),
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(help="JSONL file of rows to validate on; repeatable.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder of the run: adapter, checkpoints and logs.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the run.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Times that the data is read, in place of steps.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The largest learning rate.")] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Steps over which the learning rate rises.")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of a step, over all devices.")] = None,
    micro_batches: Annotated[
        int | None, typer.Option(help="Parts of a step's rows that are computed in turn.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Positions of a row.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Alpha of the adapter.")] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Weights that the adapter changes: q,k,v,o,router,gate,up,down."),
    ] = None,
    full: Annotated[bool, typer.Option(help="Train all parameters, and no adapter.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the adapter and the order.")] = None,
    mesh: Annotated[str | None, typer.Option(help="Devices that share the model.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; default: as stored.")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting as NAME=VALUE; repeatable."),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Compile the step for --topology, and train nothing.")
    ] = False,
    topology: Annotated[
        str | None, typer.Option(help="With --plan: chips such as tpu:v5e:2x4 or gpu:l4:1.")
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="With --plan: all layers, however long it takes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --plan: print JSON.")] = False,
) -> None:
    """Fine-tune a model on chats or text, by an adapter or as a whole.

    The same command goes on where a run was stopped. The settings are described in docs/train.md.
    """
    from mixtral_jax.cli.train.plan import check_plan_flags, plan_run
    from mixtral_jax.cli.train.run import run
    from mixtral_jax.cli.train.settings import read_settings

    flags = {
        "model": model,
        "data": data or None,
        "validation": validation or None,
        "output": output,
        "steps": steps,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "rows": rows,
        "micro_batches": micro_batches,
        "length": length,
        "rank": rank,
        "alpha": alpha,
        "targets": None if targets is None else targets.split(","),
        "seed": seed,
        "mesh": mesh,
        "dtype": dtype,
    }
    check_plan_flags(plan, topology, whole, as_json)
    if topology is not None:
        plan_run(
            settings,
            flags,
            change or [],
            is_full=full,
            topology=topology,
            is_whole=whole,
            as_json=as_json,
        )
        return
    if status := run(read_settings(settings, flags, change or [], is_full=full)):
        raise typer.Exit(status)
