"""`mixtral-jax serve`: the flags, and what the two processes that they start are given."""

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

# Of the help's parts.
_ENGINE = "Engine"
_CALLERS = "Who may ask, and how much"
_WATCHING = "Watching it"
_HOSTS = "Several hosts"

Dtype = Annotated[
    str | None,
    typer.Option(help="float32 or bfloat16; default: as stored. int8 only where stored so."),
]
ModelOption = Annotated[
    str, typer.Option("--model", help="Checkpoint folder, or tiny-random, which needs no files.")
]


def serve(
    model: ModelOption,
    host: Annotated[str, typer.Option(help="Address of both servers.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="HTTP.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="gRPC.")] = 50051,
    dtype: Dtype = None,
    mesh: Annotated[
        str,
        typer.Option(
            metavar="SIZES",
            help="How devices share the model: data=1,expert=8,tensor=1, or auto.",
            rich_help_panel=_ENGINE,
        ),
    ] = "auto",
    dp_attention: Annotated[
        bool,
        typer.Option(
            "--dp-attention",
            help="Split sequences, not heads, over the mesh's expert axis.",
            rich_help_panel=_ENGINE,
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Of process 0; the next port too.", rich_help_panel=_HOSTS
        ),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(metavar="N", help="One on each host.", rich_help_panel=_HOSTS)
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(metavar="I", help="Which this is; 0 serves.", rich_help_panel=_HOSTS),
    ] = None,
    coordinator_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Processes wait so long for one another; default: 300.",
            rich_help_panel=_HOSTS,
        ),
    ] = None,
    max_sequences: Annotated[
        int, typer.Option(min=1, help="Sequences computed together.", rich_help_panel=_ENGINE)
    ] = 32,
    max_step_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a step.", rich_help_panel=_ENGINE)
    ] = 128,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Longest queue; then 429.", rich_help_panel=_ENGINE)
    ] = 256,
    kv_memory: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="MiB of each device for keys and values; default: a part of what is free.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    kv_dtype: Annotated[
        Literal["int8"] | None,
        typer.Option(
            help="int8: keys and values take a quarter of float32's memory.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    no_prefix_reuse: Annotated[
        bool,
        typer.Option(
            "--no-prefix-reuse",
            help="Compute every prompt from its beginning.",
            rich_help_panel=_ENGINE,
        ),
    ] = False,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Equal answers whatever runs beside them.",
            rich_help_panel=_ENGINE,
        ),
    ] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Prometheus, on 127.0.0.1; default: none.",
            rich_help_panel=_WATCHING,
        ),
    ] = None,
    gateway_metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="The same of the gateway.", rich_help_panel=_WATCHING),
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Where traces go; default: nowhere.", rich_help_panel=_WATCHING
        ),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="Of lines on stderr.", rich_help_panel=_WATCHING)
    ] = "text",
    log_prompts: Annotated[
        bool,
        typer.Option(
            "--log-prompts",
            help="Log what is asked and answered, all of it.",
            rich_help_panel=_WATCHING,
        ),
    ] = False,
    usage_db: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Usage of each caller; default: in ~/.local/state.",
            rich_help_panel=_WATCHING,
        ),
    ] = None,
    max_requests_per_minute: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of each caller; then 429. Default: no limit.", rich_help_panel=_CALLERS
        ),
    ] = None,
    max_tokens_per_minute: Annotated[
        int | None,
        typer.Option(
            min=1, help="The same, of prompts and answers together.", rich_help_panel=_CALLERS
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Whose pages in browsers may ask; repeatable, or *.",
            rich_help_panel=_CALLERS,
        ),
    ] = None,
    model_type: Annotated[
        str | None, typer.Option(help="What /info says in place of chat-completions.")
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="At the end, answers under way may take so long.")
    ] = 30.0,
    keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="More keys, of `mixtral-jax keys`.", rich_help_panel=_CALLERS
        ),
    ] = None,
    entra_tenant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GUID", help="Let its Entra tokens in; repeatable.", rich_help_panel=_CALLERS
        ),
    ] = None,
    entra_allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID",
            help="Object or client id that may ask, * for all; without it none may.",
            rich_help_panel=_CALLERS,
        ),
    ] = None,
    entra_audience: Annotated[
        list[str] | None,
        typer.Option(metavar="URI", help="What tokens must be for.", rich_help_panel=_CALLERS),
    ] = None,
    entra_authority: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Where tenants publish their keys.", rich_help_panel=_CALLERS
        ),
    ] = None,
    no_auth: Annotated[
        bool,
        typer.Option(
            "--no-auth",
            help="Let everybody in; on a loopback --host only.",
            rich_help_panel=_CALLERS,
        ),
    ] = False,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="HTTPS; gRPC is then on 127.0.0.1 only.", rich_help_panel=_CALLERS
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The certificate's private key.", rich_help_panel=_CALLERS
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP and gRPC until Ctrl-C.

    Unless --keys or --no-auth say otherwise, a key that clients must send is taken from
    MIXTRAL_JAX_API_KEY, or made up and printed.

    On several hosts, run the same command with --coordinator on each; process 0 serves. They show
    one another the key in MIXTRAL_JAX_GROUP_KEY.
    """
    from serving.access.config import KEY_VARIABLE, check_flags
    from serving.accounting.ledger import usual_place
    from serving.cluster.rank import Place
    from serving.launch.supervisor import Addresses, environment_from, run, run_follower

    place = Place.of_flags(coordinator, num_processes, process_id, coordinator_timeout, os.environ)
    addresses = Addresses(host=host, port=port, grpc_port=grpc_port, tls=tls_cert is not None)
    is_follower = place is not None and not place.is_leader
    environment = environment_from(os.environ, makes_key=not (keys or no_auth or is_follower))
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
    if not is_follower:
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
        "mesh": mesh,
        "dp-attention": dp_attention,
        "no-prefix-reuse": no_prefix_reuse,
        "deterministic": deterministic,
        "coordinator": coordinator,
        "num-processes": num_processes,
        "process-id": process_id,
        "coordinator-timeout": coordinator_timeout,
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
    if place is not None and is_follower:
        joined = f"\nprocess {place.id} of {place.count} of the group at {place.coordinator}\n"
        flags = [*_flags(options), *_flags({"log-format": log_format})]
        run_follower(
            environment, flags, lambda: print(joined, flush=True), drain_seconds=drain_seconds
        )
        return
    key = environment.get(KEY_VARIABLE)
    run(
        addresses,
        environment,
        [*_flags(options), *access, *watching],
        [*access, *certificate, *watching, *books],
        lambda: print(_banner(addresses.url, addresses.target, key, asks_key=not no_auth)),
        drain_seconds=drain_seconds,
    )


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
