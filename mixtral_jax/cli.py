"""`mixtral-jax`: pull, convert, export, info, chat, serve, keys and bench."""

import importlib
import json
import os
import shlex
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from mixtral_jax import key_commands

# Heavy imports stand inside the commands: `--help` should not wait for a compiler to load.

app = typer.Typer(
    help="Mistral-7B and Mixtral in JAX: convert, look at, chat with and serve them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(key_commands.app, name="keys")

Dtype = Annotated[
    str | None,
    typer.Option(help="float32 or bfloat16; default: as stored. int8 only where stored so."),
]
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
    from mixtral_jax.checkpoint import Card, count_parameters
    from mixtral_jax.pretrained import TINY_RANDOM, open_pretrained

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
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences computed together.")] = 32,
    max_step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 128,
    max_waiting: Annotated[int, typer.Option(min=1, help="Longest queue; then 429.")] = 256,
    kv_memory: Annotated[
        int | None,
        typer.Option(min=1, help="MiB for keys and values; default: a part of what is free."),
    ] = None,
    kv_dtype: Annotated[
        Literal["int8"] | None,
        typer.Option(
            help="int8: keys and values take a quarter of float32's memory.",
        ),
    ] = None,
    no_prefix_reuse: Annotated[
        bool, typer.Option("--no-prefix-reuse", help="Compute every prompt from its beginning.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Equal answers whatever runs beside them.")
    ] = False,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Prometheus, on 127.0.0.1; default: none.")
    ] = None,
    gateway_metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The same of the gateway.")
    ] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Where traces go; default: nowhere.")
    ] = None,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="Of lines on stderr.")
    ] = "text",
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Log what is asked and answered, all of it.")
    ] = False,
    usage_db: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Usage of each caller; default: in ~/.local/state."),
    ] = None,
    max_requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Of each caller; then 429. Default: no limit.")
    ] = None,
    max_tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="The same, of prompts and answers together.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Whose pages in browsers may ask; repeatable, or *."),
    ] = None,
    model_type: Annotated[
        str | None, typer.Option(help="What /info says in place of chat-completions.")
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="At the end, answers under way may take so long.")
    ] = 30.0,
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="More keys, of `mixtral-jax keys`.")
    ] = None,
    entra_tenant: Annotated[
        list[str] | None,
        typer.Option(metavar="GUID", help="Let its Entra tokens in; repeatable."),
    ] = None,
    entra_allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID", help="Object or client id that may ask, * for all; without it none may."
        ),
    ] = None,
    entra_audience: Annotated[
        list[str] | None, typer.Option(metavar="URI", help="What tokens must be for.")
    ] = None,
    entra_authority: Annotated[
        str | None, typer.Option(metavar="URL", help="Where tenants publish their keys.")
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let everybody in; on a loopback --host only.")
    ] = False,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="HTTPS; gRPC is then on 127.0.0.1 only.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The certificate's private key.")
    ] = None,
) -> None:
    """Serve a model over HTTP and gRPC until Ctrl-C.

    Unless --keys or --no-auth say otherwise, a key that clients must send is taken from
    MIXTRAL_JAX_API_KEY, or made up and printed.
    """
    from serving.access_flags import KEY_VARIABLE, check_flags
    from serving.gateway.usage import usual_place
    from serving.supervisor import Addresses, environment_from, run

    addresses = Addresses(host=host, port=port, grpc_port=grpc_port, tls=tls_cert is not None)
    environment = environment_from(os.environ, makes_key=not (keys or no_auth))
    access = _flags(
        {
            "keys": keys,
            "entra-tenant": entra_tenant,
            "entra-allow": entra_allow,
            "entra-audience": entra_audience,
            "entra-authority": entra_authority,
            "no-auth": no_auth,
        }
    )
    certificate = _flags({"tls-cert": tls_cert, "tls-key": tls_key})
    check_flags([f"--host={host}", *access, *certificate], environment)
    options = {
        "model": model,
        "max-sequences": max_sequences,
        "max-step-tokens": max_step_tokens,
        "max-waiting": max_waiting,
        "kv-memory": kv_memory,
        "kv-dtype": kv_dtype,
        "metrics-port": metrics_port,
        "dtype": dtype,
        "no-prefix-reuse": no_prefix_reuse,
        "deterministic": deterministic,
    }
    watching = _flags({"otlp-endpoint": otlp_endpoint, "log-format": log_format})
    books = _flags(
        {
            "metrics-port": gateway_metrics_port,
            "log-prompts": log_prompts,
            "usage-db": usage_db or usual_place(),
            "max-requests-per-minute": max_requests_per_minute,
            "max-tokens-per-minute": max_tokens_per_minute,
            "cors-origin": cors_origin,
            "model-type": model_type,
        }
    )
    key = environment.get(KEY_VARIABLE)
    run(
        addresses,
        environment,
        [*_flags(options), *access, *watching],
        [*access, *certificate, *watching, *books],
        lambda: print(_banner(addresses.url, addresses.target, key, asks_key=not no_auth)),
        drain_seconds=drain_seconds,
    )


@app.command()
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
    from serving.bench import facts, load_of, plot, repeated, served, table, write_json
    from serving.load import Endpoint, median

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
        from serving.offline import OfflineEngine

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


def _flags(options: Mapping[str, object]) -> list[str]:
    """As a command takes them: lists are repeated, switches have no value."""
    flags = []
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one is not False:
                flags.append(f"--{name}" if one is True else f"--{name}={one}")
    return flags


def _banner(url: str, target: str, key: str | None, *, asks_key: bool) -> str:
    body = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "stream": True,
    }
    # A key of the file is known to its owner only.
    header = shlex.quote(f"Authorization: Bearer {key}") if key else '"Authorization: Bearer $KEY"'
    authorization = f"-H {header} " if asks_key else ""
    curl = (
        f"curl -sN {url}/chat/completions "
        f"{authorization}-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    )
    shown = f"key   {key}\n" if key else ""
    return f"\nHTTP  {url}\ngRPC  {target}\n{shown}\nTry it:\n{curl}\n"


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
