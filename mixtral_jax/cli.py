"""`mixtral-jax`: pull, convert, export, info, chat and serve."""

import importlib
import json
import os
import shlex
import sys
import threading
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

# Heavy imports stand inside the commands: `--help` should not wait for a compiler to load.

app = typer.Typer(
    help="Mistral-7B and Mixtral in JAX: convert, look at, chat with and serve them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16; default: as stored.")]
ModelOption = Annotated[
    str, typer.Option("--model", help="Checkpoint folder, or tiny-random, which needs no files.")
]


@app.command()
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
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder or file of weights, or a name that `pull` knows.")
    ],
    destination: Annotated[Path, typer.Argument(help="New checkpoint folder.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16; default: bfloat16 if the source is, else float32."),
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
    import math

    import numpy as np

    from mixtral_jax.checkpoint import Card, parameter_shapes
    from mixtral_jax.pretrained import TINY_RANDOM, open_pretrained

    toy = str(checkpoint) == TINY_RANDOM
    card = open_pretrained(TINY_RANDOM).card if toy else Card.read(checkpoint)
    shapes = parameter_shapes(card.model, card.dtype).values()
    parameters = sum(math.prod(shape.shape) for shape in shapes)
    facts: dict[str, Any] = {
        "name": card.name,
        "provider": card.provider,
        "dtype": card.dtype,
        "parameters": parameters,
        "bytes": parameters * np.dtype(card.dtype).itemsize,
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
    from mixtral_jax.tokenizer import Message

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


@app.command()
def serve(
    model: ModelOption,
    host: Annotated[str, typer.Option(help="Address of both servers.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="HTTP.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="gRPC.")] = 50051,
    dtype: Dtype = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="Requests computed together.")] = 8,
    max_step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 128,
    max_waiting: Annotated[int, typer.Option(min=1, help="Longest queue; then 429.")] = 256,
    kv_memory: Annotated[int, typer.Option(min=1, help="MiB for keys and values.")] = 512,
) -> None:
    """Serve a model over HTTP and gRPC until Ctrl-C.

    The key that clients must send is taken from MIXTRAL_JAX_API_KEY, or made up and printed.
    """
    from serving.supervisor import Addresses, key_from, run

    addresses = Addresses(host=host, port=port, grpc_port=grpc_port)
    key = key_from(dict(os.environ))
    options = {
        "model": model,
        "max-sequences": max_sequences,
        "max-step-tokens": max_step_tokens,
        "max-waiting": max_waiting,
        "kv-memory": kv_memory,
        **({"dtype": dtype} if dtype else {}),
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    run(addresses, key, flags, lambda: print(_banner(addresses.url, addresses.target, key)))


def _banner(url: str, target: str, key: str) -> str:
    body = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "stream": True,
    }
    curl = (
        f"curl -sN {url}/chat/completions "
        f"-H {shlex.quote(f'Authorization: Bearer {key}')} "
        f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    )
    return f"\nHTTP  {url}\ngRPC  {target}\nkey   {key}\n\nTry it:\n{curl}\n"


def main() -> None:
    """Runs the command; what the user can mend is told in one line, with status 1."""
    try:
        app()
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        sys.exit(f"mixtral-jax: {error}")


def _is_for_the_user(error: Exception) -> bool:
    """Whether the message was written for the one who typed the command.

    So is that of every ValueError that our own code raises, and the system's about its files.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    ours = package in ("mixtral_jax", "convert", "serving")
    return isinstance(error, OSError) or (ours and isinstance(error, (ValueError, RuntimeError)))


if __name__ == "__main__":
    main()
