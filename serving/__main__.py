"""`python -m serving`: one engine behind gRPC, until SIGTERM or SIGINT.

Prints one line for each stage of the start, and `ready` when it answers. Keys come from the
environment: MIXTRAL_JAX_API_KEY is one that clients present, MIXTRAL_JAX_SERVICE_KEY the gateway's.
"""

import argparse
import asyncio
import dataclasses
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from mixtral_jax import native
from mixtral_jax.cache import token_bytes
from mixtral_jax.checkpoint import parameter_shapes
from mixtral_jax.compilation import CompilationCount, keep_programs
from mixtral_jax.config import ModelConfig
from mixtral_jax.layers import activation_dtype
from mixtral_jax.model import Transformer
from mixtral_jax.pretrained import Pretrained, open_pretrained
from serving.access import Access
from serving.access_flags import access_of, add_access_flags
from serving.calls import Calls
from serving.engine import Engine, compile_steps
from serving.keyring import DEFAULT, GATEWAY
from serving.logs import FORMATS, set_up
from serving.memory import cache_bytes
from serving.metrics import Metrics
from serving.parent import end_with_parent
from serving.plan import Limits
from serving.proto import inference_pb2 as pb
from serving.service import InferenceService, create_server, set_serving
from serving.tls import ServerTls, add_certificate_flags
from serving.tracing import Traces
from serving.worker import EngineWorker

_PAGE_SIZE = 16


def main() -> None:
    options = _options()
    try:
        access = access_of(options, os.environ, (DEFAULT, GATEWAY))
        tls = ServerTls.of_flags(options.tls_cert, options.tls_key, options.tls_client_ca)
    except ValueError as error:
        sys.exit(f"mixtral-jax: {error}")
    end_with_parent()
    set_up("serving", options.log_format)
    try:
        pretrained = open_pretrained(options.model)
        traces = Traces.exported(options.otlp_endpoint, "service")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"mixtral-jax: {error}")
    metrics = Metrics(pretrained.card.name)
    if options.metrics_port is not None:
        try:
            port = metrics.serve(options.metrics_port)
        except OSError as error:
            sys.exit(
                f"mixtral-jax: cannot listen on 127.0.0.1:{options.metrics_port} "
                f"({error.strerror}); stop what runs there or choose another with --metrics-port"
            )
        _say(f"metrics on http://127.0.0.1:{port}/metrics")
    try:
        worker, service = _build(options, pretrained, metrics, traces)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"mixtral-jax: {error}")
    worker.start()
    try:
        address = f"{options.host}:{options.port}"
        asyncio.run(_serve(address, worker, service, access, tls, options.drain_seconds))
    except OSError as error:
        sys.exit(f"mixtral-jax: {error}")
    finally:
        worker.stop()
        traces.close()
    if worker.has_failed:
        sys.exit("mixtral-jax: the engine failed")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder, or tiny-random")
    parser.add_argument("--dtype", help="float32, bfloat16 or int8; default: as stored")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=50051)
    parser.add_argument("--max-sequences", type=_positive, default=32, help="sequences per step")
    parser.add_argument("--max-step-tokens", type=_positive, default=128, help="tokens per step")
    parser.add_argument("--max-waiting", type=_positive, default=256, help="requests in the queue")
    parser.add_argument(
        "--kv-memory",
        type=_positive,
        help="MiB of keys and values; default: most of what the weights leave of an accelerator, "
        "half of what they leave of a CPU's memory and at most 2048",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=["int8"],
        help="int8: keys and values take a quarter of float32's memory, half of bfloat16's; "
        "default: as they are computed",
    )
    parser.add_argument(
        "--no-prefix-reuse", action="store_true", help="compute every prompt from its beginning"
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="equal answers whatever runs beside them"
    )
    parser.add_argument("--metrics-port", type=int, help="for Prometheus, on 127.0.0.1; 0: any")
    parser.add_argument("--otlp-endpoint", metavar="URL", help="where traces go; default: nowhere")
    parser.add_argument("--log-format", choices=FORMATS, default="text", help="of lines on stderr")
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=30.0,
        help="at the end, answers under way may take so long",
    )
    add_access_flags(parser)
    add_certificate_flags(parser)
    parser.add_argument(
        "--tls-client-ca", metavar="FILE", help="who must vouch for the certificates of clients"
    )
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _say(text: str) -> None:
    print(f"engine: {text}", file=sys.stderr, flush=True)


def _build(
    options: argparse.Namespace, pretrained: Pretrained, metrics: Metrics, traces: Traces
) -> tuple[EngineWorker, InferenceService]:
    keep_programs()
    card = pretrained.card
    dtype = pretrained.loadable_dtype(options.dtype)
    if options.deterministic:
        _check_deterministic(dtype, card.model)
    if options.kv_dtype and jax.default_backend() == "tpu":
        raise ValueError("--kv-dtype int8 is for CPU and GPU: on TPU it takes more room, not less")
    limits = _limits(card.model, jnp.dtype(dtype), options)
    # Reading the weights and compiling for their shapes do not wait for one another.
    with ThreadPoolExecutor(1) as pool:
        _say(f"loading {options.model}")
        model = pool.submit(pretrained.load, dtype=dtype)
        _say(f"room for {limits.num_pages * limits.page_size:,} tokens of all requests together")
        abstract = Transformer(card.model, dtype=dtype, rngs=None)
        steps = compile_steps(abstract, limits, _say, options.kv_dtype)
        engine = Engine(model.result(), limits, steps)
    info = pb.ModelInfo(
        name=card.name,
        type="chat-completions",
        provider=card.provider,
        max_context=limits.max_context,
        vocab_size=card.model.vocab_size,
    )
    worker = EngineWorker(engine, metrics)
    service = InferenceService(worker, pretrained.tokenizer, info, Calls(metrics, traces))
    compilations = CompilationCount()
    metrics.watch(engine.scheduler, lambda: compilations.value)
    return worker, service


def _check_deterministic(dtype: str, config: ModelConfig) -> None:
    """Raises ValueError where equal bits are not promised."""
    if jax.default_backend() != "cpu" or dtype not in ("float32", "int8"):
        raise ValueError(
            f"--deterministic is promised on CPU for float32 and int8; this is {dtype} on "
            f"{jax.default_backend()}: leave the flag out, or give --dtype float32"
        )
    if config.head_size % native.LANES:
        raise ValueError(
            f"--deterministic needs heads of a multiple of {native.LANES} values; this model's "
            f"have {config.head_size}: leave the flag out"
        )
    if not native.available():
        raise ValueError(
            "--deterministic needs the CPU kernels, which were not built; install a C++ compiler"
        )


def _limits(config: ModelConfig, dtype: jnp.dtype, options: argparse.Namespace) -> Limits:
    per_token = token_bytes(config, options.kv_dtype or activation_dtype(dtype))
    longest = options.max_sequences * config.max_context
    if options.kv_memory is not None:
        memory = options.kv_memory << 20
    else:
        shapes = parameter_shapes(config, dtype).values()
        memory = cache_bytes(sum(math.prod(one.shape) * one.dtype.itemsize for one in shapes))
    num_pages = max(1, min(longest, memory // per_token) // _PAGE_SIZE)
    limits = Limits(
        num_pages=num_pages,
        page_size=_PAGE_SIZE,
        max_sequences=options.max_sequences,
        max_step_tokens=max(options.max_step_tokens, options.max_sequences),
        max_context=config.max_context,
        max_waiting=options.max_waiting,
        window=config.sliding_window,
        prefix_reuse=not options.no_prefix_reuse,
        deterministic=options.deterministic,
    )
    return dataclasses.replace(limits, max_context=limits.room)


async def _serve(
    address: str,
    worker: EngineWorker,
    service: InferenceService,
    access: Access,
    tls: ServerTls | None,
    drain_seconds: float,
) -> None:
    """Serves until a signal, Drain or the engine's end; then lets streams finish."""
    server, port, checks = await create_server(address, service, access, tls)
    _say(f"ready on {address.rpartition(':')[0]}:{port}")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    reasons = [
        asyncio.create_task(stop.wait()),
        asyncio.create_task(service.was_told_to_end.wait()),
        asyncio.create_task(_ended(worker)),
    ]
    await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
    for task in reasons:
        task.cancel()
    # First health, so that others get the new requests; those that come all the same are refused.
    await set_serving(checks, False)
    worker.drain()
    deadline = loop.time() + drain_seconds
    while worker.num_under_way and loop.time() < deadline:
        await asyncio.sleep(0.05)
    await server.stop(1.0)  # calls that watch its health would go on for ever


async def _ended(worker: EngineWorker) -> None:
    while not worker.ended.is_set():
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    main()
