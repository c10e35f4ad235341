"""`python -m serving`: one engine behind gRPC, until SIGTERM or SIGINT.

Prints one line for each stage of the start, and `ready` when it answers. The key comes from the
environment variable MIXTRAL_JAX_API_KEY.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp

from mixtral_jax.checkpoint import checked_dtype
from mixtral_jax.compilation import keep_programs
from mixtral_jax.config import ModelConfig
from mixtral_jax.model import Transformer
from mixtral_jax.pretrained import open_pretrained
from serving.engine import Engine, buckets, compile_steps
from serving.parent import end_with_parent
from serving.proto import inference_pb2 as pb
from serving.scheduler import Limits
from serving.service import InferenceService, create_server, set_serving
from serving.worker import EngineWorker

_PAGE_SIZE = 16
_DRAIN_SECONDS = 30.0


def main() -> None:
    options = _options()
    key = os.environ.get("MIXTRAL_JAX_API_KEY")
    if not key:
        sys.exit("mixtral-jax: set MIXTRAL_JAX_API_KEY to the key that clients will send")
    end_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        worker, service = _build(options)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"mixtral-jax: {error}")
    worker.start()
    try:
        asyncio.run(_serve(f"{options.host}:{options.port}", worker, service, key))
    except OSError as error:
        sys.exit(f"mixtral-jax: {error}")
    finally:
        worker.stop()
    if worker.has_failed:
        sys.exit("mixtral-jax: the engine failed")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder, or tiny-random")
    parser.add_argument("--dtype", help="float32 or bfloat16; default: as stored")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=50051)
    parser.add_argument("--max-sequences", type=_positive, default=8, help="requests per step")
    parser.add_argument("--max-step-tokens", type=_positive, default=128, help="tokens per step")
    parser.add_argument("--max-waiting", type=_positive, default=256, help="requests in the queue")
    parser.add_argument("--kv-memory", type=_positive, default=512, help="MiB of keys and values")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _say(text: str) -> None:
    print(f"engine: {text}", file=sys.stderr, flush=True)


def _build(options: argparse.Namespace) -> tuple[EngineWorker, InferenceService]:
    keep_programs()
    pretrained = open_pretrained(options.model)
    card = pretrained.card
    dtype = checked_dtype(options.dtype or card.dtype)
    limits = _limits(card.model, jnp.dtype(dtype).itemsize, options)
    # Reading the weights and compiling for their shapes do not wait for one another.
    with ThreadPoolExecutor(1) as pool:
        _say(f"loading {options.model}")
        model = pool.submit(pretrained.load, dtype=dtype)
        _say(f"room for {limits.num_pages * limits.page_size:,} tokens of all requests together")
        _say(f"compiling steps of {', '.join(map(str, buckets(limits)))} tokens")
        steps = compile_steps(Transformer(card.model, dtype=dtype, rngs=None), limits)
        engine = Engine(model.result(), limits, steps)
    info = pb.ModelInfo(
        name=card.name,
        type="chat-completions",
        provider=card.provider,
        max_context=limits.max_context,
        vocab_size=card.model.vocab_size,
    )
    worker = EngineWorker(engine)
    return worker, InferenceService(worker, pretrained.tokenizer, info)


def _limits(config: ModelConfig, itemsize: int, options: argparse.Namespace) -> Limits:
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_size * itemsize
    longest = options.max_sequences * config.max_context
    num_tokens = min(longest, (options.kv_memory << 20) // token_bytes)
    num_pages = max(1, num_tokens // _PAGE_SIZE)
    return Limits(
        num_pages=num_pages,
        page_size=_PAGE_SIZE,
        max_sequences=options.max_sequences,
        max_step_tokens=max(options.max_step_tokens, options.max_sequences),
        max_context=min(config.max_context, num_pages * _PAGE_SIZE),
        max_waiting=options.max_waiting,
    )


async def _serve(address: str, worker: EngineWorker, service: InferenceService, key: str) -> None:
    """Serves until a signal or the engine's end; then lets streams finish."""
    server, port, checks = await create_server(address, service, key)
    _say(f"ready on {address.rpartition(':')[0]}:{port}")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    reasons = [
        asyncio.create_task(stop.wait()),
        asyncio.create_task(_ended(worker)),
    ]
    await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
    for task in reasons:
        task.cancel()
    await set_serving(checks, False)
    worker.drain()
    await server.stop(_DRAIN_SECONDS)


async def _ended(worker: EngineWorker) -> None:
    while not worker.ended.is_set():
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    main()
