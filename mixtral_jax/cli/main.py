"""`mixtral-jax`: pull, convert, export, info, chat, serve, plan, keys and bench."""

import importlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mixtral_jax.cli import extras
from mixtral_jax.cli import keys as key_commands
from mixtral_jax.cli import plan as plan_command
from mixtral_jax.cli import serve as serve_command
from mixtral_jax.errors import UserError
from serving import flags
from serving.command_line import USER_ERRORS, run

# Heavy imports stand inside the commands: `--help` should not wait for a compiler to load.

ModelOption = Annotated[str, flags.MODEL.option()]
Dtype = Annotated[str | None, flags.DTYPE.option()]

app = typer.Typer(
    help="Mistral-7B and Mixtral in JAX: convert, look at, chat with and serve them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(key_commands.app, name="keys")


@app.command()
@extras.needs("convert")
def pull(
    name: Annotated[str, typer.Argument(help="smollm2-135m-instruct, or ORG/REPO of the hub.")],
) -> None:
    """Download weights into the user's cache and print where they are."""
    from convert.progress import bar
    from convert.pull import pull

    with bar(f"pulling {name}") as progress:
        path = pull(name, progress=progress)
    print(path)


@app.command()
@extras.needs("convert")
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder or file of weights, or a name that `pull` knows.")
    ],
    destination: Annotated[Path, typer.Argument(help="New checkpoint folder.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, or int8 (W8A8, smoothed: half of bfloat16's bytes, fastest on "
            "CPU); default: bfloat16 if the source is, else float32."
        ),
    ] = None,
    upcycle_experts: Annotated[
        int, typer.Option(help="Copy a dense feed-forward into this many experts.")
    ] = 0,
    name: Annotated[str | None, typer.Option(help="Name under which the model is served.")] = None,
) -> None:
    """Convert safetensors, GGUF or Mistral's own files to an Orbax checkpoint."""
    from convert.progress import bar
    from convert.pull import pull

    path = Path(source)
    if not path.exists():
        # jax loads while the network is busy.
        threading.Thread(target=importlib.import_module, args=("convert.convert",)).start()
        with bar(f"pulling {source}") as progress:
            path = pull(source, progress=progress)
    from convert.convert import convert

    with bar(f"converting {path.name}") as progress:
        convert(
            path,
            destination,
            dtype=dtype,
            upcycle_experts=upcycle_experts,
            name=name,
            progress=progress,
        )
    print(destination)


@app.command()
@extras.needs("convert")
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    destination: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Write a checkpoint as Hugging Face safetensors."""
    from convert.export import export
    from convert.progress import bar

    with bar(f"exporting {checkpoint.name}") as progress:
        export(checkpoint, destination, progress=progress)
    print(destination)


@app.command()
def info(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show what a checkpoint holds."""
    from mixtral_jax.checkpoint.folder import Card
    from mixtral_jax.checkpoint.parameters import count_parameters
    from mixtral_jax.checkpoint.pretrained import TINY_RANDOM, open_pretrained

    toy = str(checkpoint) == TINY_RANDOM
    card = open_pretrained(TINY_RANDOM).card if toy else Card.read(checkpoint)
    parameters, nbytes = count_parameters(card.model, card.dtype)
    facts: dict[str, Any] = {
        "name": card.name,
        "provider": card.provider,
        "dtype": card.dtype,
        "parameters": parameters,
        "bytes": nbytes,
        **card.model.to_json(),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False)
    for key, value in facts.items():
        table.add_row(key, f"{value:,}" if type(value) is int else str(value))
    Console().print(table)


@app.command()
def chat(
    model: ModelOption,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.")] = None,
    dtype: Dtype = None,
) -> None:
    """Talk to a model in the terminal. Ctrl-C ends an answer, Ctrl-D the conversation."""
    from mixtral_jax import generate, load
    from mixtral_jax.compilation import keep_programs
    from mixtral_jax.tokenization.messages import Message

    keep_programs()
    transformer, tokenizer = load(model, dtype=dtype)
    first: list[Message] = []
    if system is not None:
        first.append({"role": "system", "content": system})
    said: list[Message] = []  # user and assistant in turn
    interactive = sys.stdin.isatty()
    while True:
        try:
            text = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            break
        if not text.strip():
            continue
        said.append({"role": "user", "content": text})
        answer = ""
        try:
            for piece in generate(
                transformer,
                tokenizer,
                [*first, *said],
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            ):
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except ValueError as error:
            # Most likely the context is full; what was said last may still fit without the rest.
            print(f"[{error}. The conversation starts anew]", end="")
            said = []
            print()
            continue
        print()
        said.append({"role": "assistant", "content": answer})


app.command()(extras.needs("serve")(serve_command.serve))
app.command()(plan_command.plan)


@app.command()
@extras.needs("bench")
def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="Checkpoint folder, or tiny-random, to be served here on free ports."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Load this running server instead, of any make: the URL before /v1."),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="The bare engine of MODEL, without a server.")
    ] = False,
    concurrency: Annotated[str, typer.Option(help="Clients at once, of each level.")] = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="About, chat template included.")] = 100,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 64,
    shared_prefix: Annotated[
        int, typer.Option(min=0, help="Tokens with which all prompts begin alike.")
    ] = 0,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Of each level; by default 2 a client, 8 at least.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Measure so often, show medians.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    dtype: Dtype = None,
    max_step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step, of MODEL.")] = 128,
    api_key: Annotated[
        str | None, typer.Option(envvar="MIXTRAL_JAX_API_KEY", help="Key of the server at --url.")
    ] = None,
    name: Annotated[
        str, typer.Option("--model", help="Name of the model to ask for at --url.")
    ] = "default",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every run to this file.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw to this PNG; needs the extra `bench`.")
    ] = None,
) -> None:
    """Measure a server under load: tokens/s, time to first token, time between tokens.

    Prompts are random and differ, answers greedy and of equal length. One request is sent first
    and not counted.
    """
    from serving.bench.load import Endpoint, median
    from serving.bench.report import facts, load_of, plot, repeated, served, table, write_json

    clients = _levels(concurrency)
    if (model is None) == (url is None):
        raise typer.BadParameter("give either MODEL or --url")
    sizes = {"prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens}
    often: Any = {"requests": requests, "repeat": repeat, "seed": seed}
    before = facts()
    if url is not None:
        if offline:
            raise typer.BadParameter("--offline measures MODEL, not --url")
        endpoint = Endpoint(url=url, model=name, key=api_key)
        runs = repeated(load_of(endpoint, **sizes, shared_prefix=shared_prefix), clients, **often)
    elif offline:
        from serving.bench.offline import OfflineEngine

        engine = OfflineEngine(
            str(model),
            **sizes,
            dtype=dtype,
            concurrency=max(clients),
            max_step_tokens=max_step_tokens,
            shared_prefix=shared_prefix,
        )
        runs = repeated(engine.measure, clients, **often)
    else:
        options = {
            "max-sequences": max(clients),
            "max-step-tokens": max_step_tokens,
            "dtype": dtype,
        }
        with served(str(model), options) as endpoint:
            one = load_of(endpoint, **sizes, shared_prefix=shared_prefix)
            runs = repeated(one, clients, **often)
    levels = [median(runs[count]) for count in clients]
    what = f"{url or model}{' offline' if offline else ''}"
    Console().print(table(levels))
    if json_file is not None:
        asked = {"what": what, **sizes, "shared_prefix": shared_prefix, "dtype": dtype, **often}
        report = {"facts": before, "asked": asked, "medians": levels, "runs": list(runs.values())}
        write_json(json_file, {**report, "load_average_after": os.getloadavg()})
    if plot_file is not None:
        plot(plot_file, levels, f"{what}: {prompt_tokens}-token prompts, {answer_tokens} tokens")


def _levels(text: str) -> list[int]:
    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1 or len(set(levels)) < len(levels):
        raise typer.BadParameter(f"--concurrency is {text!r}; give numbers like 1,8,32")
    return levels


def main() -> None:
    """Runs the command and ends the process with its status."""
    sys.exit(run(app, errors=(UserError, *USER_ERRORS)))


if __name__ == "__main__":
    main()
