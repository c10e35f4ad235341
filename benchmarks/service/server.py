"""The service under test: all of it is real but the device."""

import asyncio
import signal
from pathlib import Path

from benchmarks.service.device import InstantDevice
from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.access.caller import GATEWAY
from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.engine.engine import Engine
from serving.engine.metrics import Metrics
from serving.engine.worker import EngineWorker
from serving.launch.event_loop import run_loop
from serving.parent import end_with_parent
from serving.proto import inference_pb2 as pb
from serving.scheduling.step_plan import Limits
from serving.service.call_record import Calls
from serving.service.service import InferenceService, create_server

CONTEXT = 2048
_TEXT = (
    "The keeper of the lighthouse wrote every evening what the sea had brought: 3 planks, a "
    "bottle without a letter, and once, in the spring of 1887, a piano that still played. "
)


def serve(model: Path, streams: int, step_seconds: float, key: str) -> None:
    """Prints a free port and serves on it until a signal ends it, for so many streams at once."""
    end_with_parent()
    pretrained = open_pretrained(model)
    run_loop(
        _serve(pretrained.tokenizer, pretrained.card.model.vocab_size, streams, step_seconds, key)
    )


async def _serve(
    tokenizer: Tokenizer, vocab_size: int, streams: int, step_seconds: float, key: str
) -> None:
    limits = Limits(
        num_pages=streams * CONTEXT // 16,
        page_size=16,
        max_sequences=streams,
        max_step_tokens=max(512, 2 * streams),
        max_context=CONTEXT,
        max_waiting=2 * streams,
    )
    device = InstantDevice(tokenizer.encode(_TEXT), step_seconds)
    metrics = Metrics("instant")
    engine = Engine(device, limits)
    engine.on_step = metrics.stepped
    worker = EngineWorker(engine, metrics)
    info = pb.ModelInfo(
        name="instant", type="chat-completions", max_context=CONTEXT, vocab_size=vocab_size
    )
    service = InferenceService(worker, tokenizer, info, Calls(metrics))
    access = Access(Keyring({GATEWAY: key}))
    server, port, _ = await create_server("127.0.0.1:0", service, access, max_calls=3 * streams)
    worker.start()
    print(port, flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    await server.stop(0.0)
    worker.stop()
