"""The service under test: all of it is real but the device."""

import asyncio
import os
import signal
import socket
import sys
import time
from concurrent.futures import Future
from pathlib import Path

from benchmarks.service.device import InstantDevice
from mixtral_jax.checkpoint.pretrained import Pretrained, open_pretrained
from mixtral_jax.structure.compiler import Compiler
from serving.access.caller import GATEWAY
from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.accounting.accounts import Accounts
from serving.accounting.ledger import UsageLedger
from serving.accounting.ledger_server import LedgerServer
from serving.engine.engine import Engine
from serving.engine.metrics import Metrics
from serving.engine.worker import EngineWorker
from serving.flags import SERVICE_KEY_VARIABLE
from serving.launch.event_loop import run_loop
from serving.launch.text_processes import TextProcesses
from serving.parent import end_with_parent
from serving.proto import inference_pb2 as pb
from serving.proto import texts_pb2
from serving.scheduling.step_plan import Limits
from serving.service.call_record import Calls
from serving.service.service import InferenceService, create_server
from serving.texts.hub import Hub, Parts

CONTEXT = 2048
_TEXT = (
    "The keeper of the lighthouse wrote every evening what the sea had brought: 3 planks, a "
    "bottle without a letter, and once, in the spring of 1887, a piano that still played. "
)


def serve(model: Path, streams: int, step_seconds: float, processes: int, key: str) -> None:
    """Prints free ports and serves on them until a signal ends it, for so many streams at once.

    Args:
        model: A checkpoint, for its tokenizer.
        streams: Most streams at once.
        step_seconds: Time of a step of the device.
        processes: Those that answer calls, each on a port of its own.
        key: Who calls presents it, as the gateway does.
    """
    end_with_parent()
    os.environ[SERVICE_KEY_VARIABLE] = key  # for the text processes
    run_loop(_serve(open_pretrained(model), streams, step_seconds, processes, key))


async def _serve(
    pretrained: Pretrained, streams: int, step_seconds: float, processes: int, key: str
) -> None:
    limits = Limits(
        num_pages=streams * CONTEXT // 16,
        page_size=16,
        max_sequences=streams,
        max_step_tokens=max(512, 2 * streams),
        max_context=CONTEXT,
        max_waiting=2 * streams,
    )
    device = InstantDevice(pretrained.tokenizer.encode(_TEXT), step_seconds)
    metrics = Metrics("instant")
    engine = Engine(device, limits)
    engine.on_step = metrics.stepped
    worker = EngineWorker(engine, metrics)
    info = pb.ModelInfo(
        name="instant",
        type="chat-completions",
        max_context=CONTEXT,
        vocab_size=pretrained.card.model.vocab_size,
    )
    worker.start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    if processes == 1:
        service = InferenceService(worker, pretrained.tokenizer, info, Calls(metrics))
        access = Access(Keyring({GATEWAY: key}))
        server, port, _ = await create_server("127.0.0.1:0", service, access, max_calls=3 * streams)
        print(port, flush=True)
        await ended.wait()
        await server.stop(0.0)
    else:
        ports = _free_ports(processes)
        front = _text_processes(pretrained, worker, metrics, info, ports, 3 * streams)
        await front.start()
        print(*ports, flush=True)
        await ended.wait()
        await front.finish(time.monotonic())
    worker.stop()


def _text_processes(
    pretrained: Pretrained,
    worker: EngineWorker,
    metrics: Metrics,
    info: pb.ModelInfo,
    ports: list[int],
    max_calls: int,
) -> TextProcesses:
    """Returns the service's own text processes, one for each port."""
    words, width = pretrained.tokenizer, info.vocab_size
    ready: Future[None] = Future()
    ready.set_result(None)
    parts = Parts(
        engine=worker,
        metrics=metrics,
        adapters=None,
        compiler=Compiler(words, width, processes=0),
        prepare_scores=lambda: ready,
        num_waiting=lambda: 0,
    )
    welcome = texts_pb2.Welcome(
        info=info.SerializeToString(),
        tokenizer=str(pretrained.folder),
        width=width,
        max_calls=max_calls,
    )
    return TextProcesses(
        Hub(parts),
        welcome,
        dict,
        ["--model", str(pretrained.folder)],
        ("127.0.0.1", 0),
        ports,
        len(ports),
        LedgerServer(Accounts(ledger=UsageLedger())),
        lambda line: print(line, file=sys.stderr),
    )


def _free_ports(count: int) -> list[int]:
    """Returns ports of this machine that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports
