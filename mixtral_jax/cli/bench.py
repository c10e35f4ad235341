"""`mixtral-jax bench`: measures a server under load, or the bare engine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mixtral_jax.cli import extras
from mixtral_jax.cli.options import DtypeOption
from serving.command_line import ended_by_signals
from serving.flags import KEY_VARIABLE

if TYPE_CHECKING:
    from serving.bench.load import Endpoint
    from serving.bench.report import Measure


@extras.needs("bench")
def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="Checkpoint folder, or tiny-random, to be served here on free ports."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Running server to load instead, of any make: its URL before /v1."),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Measure the bare engine of MODEL, without a server.")
    ] = False,
    concurrency: Annotated[
        str, typer.Option(help="Number of clients at once, for each level.")
    ] = "1,8,32",
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt, about, with the chat template.")
    ] = 100,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    shared_prefix: Annotated[
        int, typer.Option(min=0, help="Tokens at the beginning that all prompts share.")
    ] = 0,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Requests of a level; default: 2 for each client, at least 8."),
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=1, help="Number of measurements, whose medians are shown.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    dtype: DtypeOption = None,
    max_step_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Maximum number of new tokens in a step of MODEL; default: by chip."
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar=KEY_VARIABLE, help="Key of the server at --url.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--model", help="Name of the model or adapter to ask for at --url; default: none."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="JSON file for every measurement.")
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="PNG file for a plot; needs the extra bench."),
    ] = None,
) -> None:
    """Measure a server under load: tokens/s, time to first token, time between tokens.

    Prompts are random and differ, answers are greedy and of equal length. The first request is not
    counted.
    """
    from serving.bench.load import Endpoint, median
    from serving.bench.report import facts, plot, repeated, table, write_json

    clients = _levels(concurrency)
    if (model is None) == (url is None):
        raise typer.BadParameter("give either MODEL or --url")
    if url is not None and offline:
        raise typer.BadParameter("--offline measures MODEL, not --url")
    load: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "answer_tokens": answer_tokens,
        "shared_prefix": shared_prefix,
    }
    turns: Any = {"requests": requests, "repeat": repeat, "seed": seed}
    before = facts()
    endpoint = None if url is None else Endpoint(url=url, model=name, key=api_key)
    sizes = {"concurrency": max(clients), "max_step_tokens": max_step_tokens, "dtype": dtype}
    with ended_by_signals(), _measured(model, endpoint, offline, load, sizes) as measure:
        runs = repeated(measure, clients, **turns)
    levels = [median(runs[count]) for count in clients]
    title = f"{url or model}{' offline' if offline else ''}"
    Console().print(table(levels))
    if json_file is not None:
        asked = {"what": title, **load, "dtype": dtype, **turns}
        report = {"facts": before, "asked": asked, "medians": levels, "runs": list(runs.values())}
        write_json(json_file, {**report, "load_average_after": os.getloadavg()})
    if plot_file is not None:
        plot(plot_file, levels, f"{title}: {prompt_tokens}-token prompts, {answer_tokens} tokens")


@contextmanager
def _measured(
    model: str | None,
    endpoint: "Endpoint | None",
    offline: bool,
    load: dict[str, Any],
    sizes: dict[str, Any],
) -> "Iterator[Measure]":
    """Returns how a level is measured: at an endpoint, in the bare engine, or in a server of ours.

    The server runs until the block ends.
    """
    from serving.bench.report import load_of
    from serving.bench.server import served

    if endpoint is not None:
        yield load_of(endpoint, **load)
    elif offline:
        from serving.bench.offline import OfflineEngine

        yield OfflineEngine.of_checkpoint(str(model), **load, **sizes).measure
    else:
        options = {
            "max-sequences": sizes["concurrency"],
            "max-step-tokens": sizes["max_step_tokens"],
            "dtype": sizes["dtype"],
        }
        with served(str(model), options) as served_endpoint:
            yield load_of(served_endpoint, **load)


def _levels(text: str) -> list[int]:
    """Reads numbers with commas between; each stands once."""
    try:
        levels = [int(number) for number in text.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1 or len(set(levels)) < len(levels):
        raise typer.BadParameter(f"--concurrency is {text!r}; give numbers like 1,8,32")
    return levels
