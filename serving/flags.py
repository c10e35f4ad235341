"""Every flag of `mixtral-jax serve`, `python -m serving` and `python -m serving.gateway`, once.

A flag has a name, a type, a default, a help text and a panel of `--help`. A secret has the name of
an environment variable instead, because lists of processes show command lines. `SERVE`, `SERVICE`
and `GATEWAY` are the flags of the three commands, in the order of their help.

A command turns the given values into frozen records with `record`: the fields of a record have the
names of flags. `arguments` writes records as the command line of a child process.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import typer

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

KEY_VARIABLE = "MIXTRAL_JAX_API_KEY"
"""Environment variable of a key that clients present."""
SERVICE_KEY_VARIABLE = "MIXTRAL_JAX_SERVICE_KEY"
"""Environment variable of the key that the gateway presents to the service."""
GROUP_KEY_VARIABLE = "MIXTRAL_JAX_GROUP_KEY"
"""Environment variable of the key that the processes of one model present to process 0."""
SECRETS = {
    "api_key": KEY_VARIABLE,
    "gateway_key": SERVICE_KEY_VARIABLE,
    "group_key": GROUP_KEY_VARIABLE,
}
"""Names of fields of records, and the environment variables that hold their values."""

REQUIRED = ...
R = TypeVar("R")


@dataclass(frozen=True)
class Flag:
    """A flag of the command line."""

    name: str
    """Name of the value and of the fields of records that hold it, such as `max_sequences`."""
    type: Any
    """A type that typer reads: str, int, float, bool, Path, a Literal, or a list of these."""
    default: Any
    """Value without the flag. A switch with the default True is turned off by `--no-NAME`."""
    help: str
    metavar: str | None = None
    min: float | None = None
    max: float | None = None
    panel: str | None = None

    @property
    def spelling(self) -> str:
        """The flag as it is typed, such as `--max-sequences` or `--no-prefix-reuse`."""
        return f"--{'no-' if self.default is True else ''}{self.name.replace('_', '-')}"

    def option(self) -> Any:
        """Returns the flag in the form of typer."""
        # A space before the slash declares a switch that can only be turned off.
        declaration = f" /{self.spelling}" if self.default is True else self.spelling
        return typer.Option(
            declaration,
            help=self.help,
            metavar=self.metavar,
            min=self.min,
            max=self.max,
            rich_help_panel=self.panel,
            show_default=self.default not in (None, False, True, [], REQUIRED),
        )


def _panel(title: str, *flags: Flag) -> tuple[Flag, ...]:
    """Returns the flags with the panel of the help that they are shown in."""
    return tuple(replace(flag, panel=title) for flag in flags)


MODEL = Flag(
    "model",
    str,
    REQUIRED,
    "Checkpoint folder, also gs://BUCKET/... or s3://BUCKET/..., or tiny-random, which needs no "
    "files.",
    "FOLDER",
)
DTYPE = Flag(
    "dtype",
    str | None,
    None,
    "Type of the weights: float32, bfloat16, or int8 or fp8 if the checkpoint is stored so; "
    "default: as stored.",
)
MESH = Flag(
    "mesh",
    str,
    "auto",
    "How devices share the model, such as data=1,expert=8,tensor=1, or auto.",
    "SIZES",
)
DP_ATTENTION = Flag(
    "dp_attention", bool, False, "Split sequences instead of heads over the mesh's expert axis."
)
_HOST = Flag("host", str, "127.0.0.1", "Address to listen on.")
_PORT = Flag("port", int, 8000, "Port of HTTP; 0: any.", min=0, max=65535)
_GRPC_PORT = Flag("grpc_port", int, 50051, "Port of gRPC.", min=1, max=65535)
_MODEL_TYPE = Flag(
    "model_type",
    str | None,
    None,
    "Type of the model in /info, for clients that expect another one than chat-completions.",
)
_HEARTBEAT_SECONDS = Flag(
    "heartbeat_seconds",
    float,
    15.0,
    "Seconds of silence after which a stream sends a chunk without choices.",
    min=0.001,
)
_DRAIN_SECONDS = Flag(
    "drain_seconds",
    float,
    30.0,
    "Seconds that running answers may take to finish after a signal to end.",
    min=0,
)
_DRAIN_DELAY = Flag(
    "drain_delay",
    float,
    0.0,
    "Seconds after a signal to end in which requests are still served, while readiness fails at "
    "once: load balancers send new requests elsewhere.",
    min=0,
)
_GATEWAY_PROCESSES = Flag(
    "gateway_processes",
    int,
    1,
    "Processes of the gateway, which accept connections at one port and share one ledger of "
    "limits and usage.",
    "N",
    min=1,
    max=64,
)
_STEP_TIMEOUT = Flag(
    "step_timeout",
    float,
    60.0,
    "Seconds that a step of the engine may take; after that every request ends with status 503 and "
    "the service starts again.",
    "SECONDS",
    min=0.1,
    panel="Engine",
)
_STREAM_INTERVAL = Flag(
    "stream_interval",
    int,
    1,
    "Tokens of an event of a stream, but for the first one, which comes at once, and the last one.",
    "TOKENS",
    min=1,
    panel="Engine",
)
_ENGINE = _panel(
    "Engine",
    MESH,
    DP_ATTENTION,
    Flag(
        "max_sequences",
        int | None,
        None,
        "Maximum number of sequences in a step; default: by chip and model, 32 on CPU.",
        min=1,
    ),
    Flag(
        "max_step_tokens",
        int | None,
        None,
        "Maximum number of new tokens in a step, for the length of which every answer may wait; "
        "default: by chip and model, 128 on CPU.",
        min=1,
    ),
    Flag(
        "max_decode_slowdown",
        float,
        2.3,
        "Times that a step may take what its answers alone would, when prompts of more than two "
        "steps are computed beside them: these then take X / (X - 1) times as long as alone; inf: "
        "no bound.",
        "X",
        min=1.05,
    ),
    Flag(
        "speculate",
        str | None,
        None,
        "Guess the next tokens of answers, so that a step computes several at once: lookup, from "
        "what they and their prompts repeat. Guesses that turn out wrong change no answer; "
        "default: no guesses.",
        "WAY",
    ),
    Flag(
        "draft_model",
        str | None,
        None,
        "Checkpoint folder of a smaller model with the same tokenizer, which guesses the next "
        "tokens of answers, so that a step computes several at once. Guesses that turn out wrong "
        "change no answer; default: no guesses.",
        "FOLDER",
    ),
    Flag(
        "step_buckets",
        str | None,
        None,
        "Numbers of tokens that steps are padded to, such as 8,64,512; each is a program to "
        "compile; default: by chip.",
        "SIZES",
    ),
    Flag(
        "page_size",
        int | None,
        None,
        "Tokens of a page of keys and values: 16, 32, 64, 128 or 256; default: by chip.",
        min=16,
        max=256,
    ),
    Flag(
        "max_waiting",
        int,
        256,
        "Maximum number of choices of one caller in the queue; when several callers wait, each "
        "has an even share. More are refused with status 429.",
        min=1,
    ),
    Flag(
        "kv_memory",
        int | None,
        None,
        "MiB of keys and values on each device; default: most of what the weights leave of an "
        "accelerator's memory, half of what they leave of a CPU's and at most 2048.",
        "MIB",
        min=1,
    ),
    Flag(
        "kv_dtype",
        Literal["int8", "fp8", "bfloat16", "float32"] | None,
        None,
        "Type of keys and values: int8 and fp8 (e4m3) take a quarter of float32's memory and half "
        "of bfloat16's, and int8 is the more exact; default: as they are computed, but small "
        "where an accelerator would have no room for the model's context otherwise.",
    ),
    Flag("prefix_reuse", bool, True, "Compute every prompt from its beginning."),
    Flag("deterministic", bool, False, "Answer equal requests equally, whatever runs beside them."),
)
_ADAPTERS = _panel(
    "Adapters",
    Flag(
        "adapter",
        list[str],
        [],
        "LoRA adapter that is served beside the model under a name of its own: a folder as PEFT "
        "writes it; repeatable.",
        "NAME=FOLDER",
    ),
    Flag(
        "adapters_folder",
        str | None,
        None,
        "Folder, also gs://BUCKET/... or s3://BUCKET/..., whose subfolders are adapters under "
        "their own names; they are loaded and unloaded while the server runs, as they come and go.",
        "FOLDER",
    ),
    Flag(
        "max_adapters",
        int | None,
        None,
        "Adapters that are loaded at the same time, for which memory is kept; default: 8, or as "
        "many as --adapter names, and none without these two flags.",
        "N",
        min=1,
    ),
    Flag("max_adapter_rank", int, 16, "Largest rank of an adapter.", "RANK", min=1),
)
# The names that Azure's and LangChain's packages for Mistral send if they are given none.
_MODEL_ALIAS = Flag(
    "model_alias",
    list[str],
    ["azureai", "mistral-small"],
    "Another name under which requests mean the model itself; repeatable; * for every name that no "
    "adapter has.",
    "NAME",
    panel="Adapters",
)
_SERVICE_PROCESSES = Flag(
    "service_processes",
    int,
    1,
    "Processes that read requests and write text, so that many streams do not wait for one; with "
    "more than one the engine has a process of its own beside them.",
    "N",
    min=1,
    panel="Engine",
)
_TEXT_PORT = Flag(
    "text_port",
    list[int],
    [],
    "Port of gRPC on 127.0.0.1 of one of several --service-processes alone, for a gateway that "
    "takes them in turn; repeatable, one for each.",
    "PORT",
    panel="Engine",
)
_PROMPTS = _panel(
    "Engine",
    Flag(
        "max_bytes_per_token",
        int,
        16,
        "Most bytes of a prompt for each token of the context; a prompt of more is refused before "
        "it is tokenized.",
        "BYTES",
        min=1,
    ),
)
_SAMPLING_DEFAULTS = _panel(
    "Engine",
    Flag(
        "generation_config",
        str,
        "auto",
        "Folder of the generation_config.json whose temperature, top_p, top_k, min_p and "
        "repetition_penalty hold where a request leaves them out; auto: the checkpoint's; vllm: "
        "none.",
        "FOLDER",
    ),
    Flag(
        "override_generation_config",
        str | None,
        None,
        """JSON object whose values replace those of the file, such as '{"temperature": 0.2}'.""",
        "JSON",
    ),
)
_GROUP = _panel(
    "Several hosts",
    Flag(
        "coordinator",
        str | None,
        None,
        "Address of process 0, the same for all processes; the next port is used too.",
        "HOST:PORT",
    ),
    Flag("num_processes", int | None, None, "Number of processes that run the model.", "N"),
    Flag("process_id", int | None, None, "Number of this process, from 0; process 0 serves.", "I"),
    Flag(
        "coordinator_timeout",
        float | None,
        None,
        "Seconds that processes wait for one another; default: 300.",
        "SECONDS",
    ),
)
_GROUP_CA = Flag(
    "tls_client_ca",
    Path | None,
    None,
    "Authority of the certificates of all processes; turns TLS between them on. Their --tls-cert "
    "and --tls-key then serve both ends, and that of process 0 names the host of --coordinator.",
    "FILE",
    panel="Several hosts",
)
_METRICS_PORT = Flag(
    "metrics_port",
    int | None,
    None,
    "Port for Prometheus; 0: any; default: none.",
    min=0,
    max=65535,
)
_METRICS_HOST = Flag(
    "metrics_host",
    str,
    "127.0.0.1",
    "Address of the port for Prometheus, which asks for no key.",
)
_EXPERT_METRICS = Flag(
    "expert_metrics",
    bool,
    False,
    "Count the tokens that each expert of each layer gets, for --metrics-port; of mixtures.",
)
_PROFILE = (
    Flag(
        "profile",
        Path | None,
        None,
        "Folder of profiles of the running service, for XProf, TensorBoard and Perfetto: SIGUSR1 "
        "starts one, SIGUSR2 ends it; default: signals make none.",
        "DIR",
    ),
    Flag(
        "profile_seconds",
        float,
        10.0,
        "Seconds after which a profile ends by itself.",
        "SECONDS",
        min=0.1,
    ),
)
_TRACES_AND_LOGS = (
    Flag(
        "otlp_endpoint",
        str | None,
        None,
        "Collector that traces are sent to; default: none.",
        "URL",
    ),
    Flag("log_format", Literal["text", "json"], "text", "Format of log lines on stderr."),
)
_TRUST_TRACEPARENT = Flag(
    "trust_traceparent",
    bool,
    False,
    "Continue the traces of clients, and sample as they say; else a trace begins here and has a "
    "link to theirs.",
)
_LOG_PROMPTS = Flag("log_prompts", bool, False, "Log the full text of prompts and answers.")
_USAGE_DB = Flag(
    "usage_db", str, ":memory:", "SQLite file that keeps the usage of each caller.", "FILE"
)
_CONNECTIONS = _panel(
    "Connections of HTTP",
    Flag(
        "max_connections",
        int,
        4096,
        "Open connections; the longest idle makes room for a new one.",
        "N",
        min=1,
    ),
    Flag(
        "max_connections_per_address",
        int,
        512,
        "The same for each client's address; the proxies of --forwarded-allow-ips are exempt.",
        "N",
        min=1,
    ),
    Flag(
        "head_seconds",
        float,
        10.0,
        "Seconds that the head of a request may take to arrive, and a TLS handshake.",
        min=0.001,
    ),
    Flag(
        "body_seconds",
        float,
        30.0,
        "Seconds that the body of a request may take to arrive.",
        min=0.001,
    ),
    Flag(
        "keep_alive_seconds",
        float,
        75.0,
        "Seconds that a connection may be idle between two requests; more than those of a load "
        "balancer in front.",
        min=0.001,
    ),
    Flag(
        "forwarded_allow_ips",
        list[str],
        [],
        "Address or network of a proxy whose X-Forwarded-For is believed, or *; repeatable.",
        "ADDRESS",
    ),
)
_ACCESS = _panel(
    "Authentication and limits",
    Flag(
        "keys",
        Path | None,
        None,
        "File of more keys, made by `mixtral-jax keys`; its changes take effect at once.",
        "FILE",
    ),
    Flag(
        "entra_tenant",
        list[str],
        [],
        "Tenant of Microsoft Entra ID whose tokens are accepted; repeatable.",
        "GUID",
    ),
    Flag(
        "entra_allow",
        list[str],
        [],
        "Object id or client id that may ask, or * for the whole tenant; repeatable; without it "
        "tokens open nothing.",
        "ID",
    ),
    Flag(
        "entra_audience",
        list[str],
        [],
        "Audience that tokens must have; repeatable; default: https://ml.azure.com and "
        "https://cognitiveservices.azure.com.",
        "URI",
    ),
    Flag(
        "entra_role",
        list[str],
        [],
        "Role, of the application that tokens are for, of which a token must have at least one; "
        "repeatable; default: none is asked for.",
        "ROLE",
    ),
    Flag(
        "entra_authority",
        str | None,
        None,
        "Where tenants publish their keys; default: https://login.microsoftonline.com.",
        "URL",
    ),
    Flag("no_auth", bool, False, "Let everybody in; allowed on a loopback --host only."),
    Flag("tls_cert", Path | None, None, "Certificate chain in PEM; turns TLS on.", "FILE"),
    Flag(
        "tls_key", Path | None, None, "Private key of the certificate, without a password.", "FILE"
    ),
    Flag(
        "tls_client_ca",
        Path | None,
        None,
        "Authority of the certificates that clients must show, and of those of all processes "
        "that run the model.",
        "FILE",
    ),
)
_ACCOUNTING = _panel(
    "Authentication and limits",
    Flag(
        "max_requests_per_minute",
        int | None,
        None,
        "Requests of a caller in a minute; more are refused with status 429; default: no limit.",
        "N",
        min=1,
    ),
    Flag(
        "max_tokens_per_minute",
        int | None,
        None,
        "The same for tokens of prompts and answers together, which are reserved before they are "
        "computed.",
        "N",
        min=1,
    ),
    Flag(
        "max_concurrent_requests",
        int | None,
        None,
        "Requests of a caller that are answered at the same time; default: no limit.",
        "N",
        min=1,
    ),
    Flag(
        "limit_share",
        str,
        "1",
        "Part of these limits that this server enforces, such as 1/3 for each of three.",
        "FRACTION",
    ),
    Flag(
        "assumed_max_tokens",
        int,
        1024,
        "Tokens that are reserved for an answer whose request sets no max_tokens.",
        "N",
        min=1,
    ),
    Flag(
        "cached_token_charge",
        float,
        1.0,
        "Part of a cached token of a prompt that counts as a token of the limit.",
        min=0,
        max=1,
    ),
    Flag(
        "share_prefixes",
        bool,
        False,
        "Let callers share computed prefixes with one another: for callers who trust one another, "
        "because the time to a first token tells whether somebody has sent the same beginning.",
    ),
)
_BROWSERS = _panel(
    "Authentication and limits",
    Flag(
        "cors_origin",
        list[str],
        [],
        "Origin whose pages in browsers may ask, such as https://example.org, or *; repeatable.",
        "ORIGIN",
    ),
)
_PAGE = Flag("page", bool, True, "Serve no page to chat with at /.", panel="Page to chat with")
_OPEN = Flag(
    "open",
    bool,
    False,
    "Open the page in the browser of this machine when the server is ready.",
    panel="Page to chat with",
)
_ROUTES = _panel(
    "Dialects",
    Flag(
        "root_path",
        str,
        "",
        "Path before all routes under which a proxy publishes the server, such as /models/mixtral.",
        "PATH",
    ),
    Flag(
        "metrics_route",
        Literal["operators", "open", "off"],
        "operators",
        "Who may ask for GET /metrics on the port of HTTP: operators, by their keys; open: "
        "everybody, without a key; off: nobody.",
    ),
    Flag(
        "usage_details",
        bool,
        False,
        "Tell the cached tokens of prompts in the usage of OpenAI's chats and texts too, in an "
        "object at which clients stumble that add all numbers up, such as langchain-mistralai.",
    ),
)
_DIALECTS = _panel(
    "Dialects",
    Flag(
        "ignore_hosted_tools",
        bool,
        False,
        "Leave out tools that only OpenAI or Anthropic can run, such as web_search, on the routes "
        "of Responses and Messages, and list them in a header of the answer; else they are "
        "refused.",
    ),
)
_UPSTREAM = _panel(
    "TLS to the service",
    Flag("service_ca", Path | None, None, "Authority of its certificate; turns TLS on.", "FILE"),
    Flag("service_cert", Path | None, None, "Certificate that is shown to it (mTLS).", "FILE"),
    Flag("service_key", Path | None, None, "Private key of that certificate.", "FILE"),
    Flag(
        "service_name",
        str | None,
        None,
        "Name in its certificate, if that is not its address.",
        "NAME",
    ),
)

SERVICE = (
    *(MODEL, _HOST, replace(_PORT, default=50051, help="Port of gRPC; 0: any."), DTYPE),
    *(_DRAIN_SECONDS, _DRAIN_DELAY, *_ENGINE, *_PROMPTS, *_SAMPLING_DEFAULTS, _STEP_TIMEOUT),
    *(_STREAM_INTERVAL, _SERVICE_PROCESSES, _TEXT_PORT, *_GROUP),
    *(*_ADAPTERS, _MODEL_ALIAS),
    *_panel("Monitoring", _METRICS_PORT, _METRICS_HOST, _EXPERT_METRICS),
    *_panel("Monitoring", *_PROFILE, *_TRACES_AND_LOGS, _USAGE_DB),
    *(*_ACCOUNTING, *_ACCESS),
)
GATEWAY = (
    Flag(
        "target",
        list[str],
        ["127.0.0.1:50051"],
        "Address of a model service; repeat it for replicas, or give dns:///NAME:PORT.",
        "HOST:PORT",
    ),
    *(_HOST, _PORT),
    _HEARTBEAT_SECONDS,
    *(_MODEL_TYPE, _DRAIN_SECONDS, _DRAIN_DELAY, _GATEWAY_PROCESSES),
    *_panel("Monitoring", _METRICS_PORT, _METRICS_HOST, *_TRACES_AND_LOGS),
    *_panel("Monitoring", _TRUST_TRACEPARENT, _LOG_PROMPTS, _USAGE_DB),
    *(*_CONNECTIONS, *_ACCOUNTING, *_BROWSERS, *_ACCESS[:-1], *_UPSTREAM, *_DIALECTS),
    *(*_ROUTES, _PAGE),
)
SERVE = (
    *(MODEL, replace(_HOST, help="Address of both servers.")),
    *(replace(_PORT, min=1, help="Port of HTTP."), _GRPC_PORT),
    *(DTYPE, _MODEL_TYPE, _HEARTBEAT_SECONDS, _DRAIN_SECONDS, _DRAIN_DELAY, _GATEWAY_PROCESSES),
    *(*_ENGINE, *_PROMPTS, *_SAMPLING_DEFAULTS, _STEP_TIMEOUT),
    *(_STREAM_INTERVAL, _SERVICE_PROCESSES),
    *(*_GROUP, _GROUP_CA),
    *(*_ADAPTERS, _MODEL_ALIAS),
    *_panel(
        "Monitoring",
        replace(_METRICS_PORT, min=1, help="Port for Prometheus; default: none."),
        replace(
            _METRICS_PORT, name="gateway_metrics_port", min=1, help="The same for the gateway."
        ),
        *(_METRICS_HOST, _EXPERT_METRICS, *_PROFILE),
        *(*_TRACES_AND_LOGS, _TRUST_TRACEPARENT, _LOG_PROMPTS),
        replace(
            _USAGE_DB,
            type=str | None,
            default=None,
            help="SQLite file that keeps the usage of each caller; default: in ~/.local/state.",
        ),
    ),
    *(*_CONNECTIONS, *_ACCOUNTING, *_BROWSERS, *_ACCESS[:-1], *_DIALECTS),
    *(*_ROUTES, _PAGE, _OPEN),
)
_CHILDREN = {flag.name: flag for flag in (*SERVICE, *GATEWAY)}


def defaults(flags: Sequence[Flag], **given: Any) -> dict[str, Any]:
    """Returns the values of flags of which only `given` are on the command line."""
    return {flag.name: flag.default for flag in flags} | given


def secrets(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Returns the secrets of the environment by the names of their fields; empty ones are None."""
    return {name: environment.get(variable) or None for name, variable in SECRETS.items()}


def record(make: Callable[..., R], given: Mapping[str, Any], **others: Any) -> R:
    """Calls a record's class, or a function, with the values that are named as its parameters."""
    names = inspect.signature(make).parameters
    values = {name: value for name, value in given.items() if name in names} | others
    # Records are frozen and compared: a repeatable flag is a tuple in them.
    return make(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def arguments(*records: DataclassInstance | None) -> list[str]:
    """Writes records as flags for a child process.

    Secrets and fields that are no flags are left out. None stands for a record without flags.
    """
    written = []
    for values in records:
        for field in dataclasses.fields(values) if values is not None else ():
            flag, value = _CHILDREN.get(field.name), getattr(values, field.name)
            if flag is None or value is None or (flag.type is bool and value == flag.default):
                continue
            elif flag.type is bool:
                written.append(flag.spelling)
            else:
                items = value if isinstance(value, tuple) else (value,)
                written += [f"{flag.spelling}={item}" for item in items]
    return written
