"""The service's process when a step of its engine stands still, and when it ends; no model."""

import asyncio
import os
import signal
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.accounting.accounts import Accounts
from serving.accounting.admission import Admission
from serving.accounting.caller_fields import CallerFields
from serving.engine.metrics import Metrics
from serving.engine.worker import EngineWorker
from serving.errors import EngineFailure
from serving.flags import SERVICE, defaults, record
from serving.launch.config import ServiceConfig
from serving.launch.front import LocalFront
from serving.launch.late_programs import LatePrograms
from serving.launch.service_process import _Server
from serving.parent import BEAT_VARIABLE
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from serving.scheduling.request import Drawn, Event, Request
from serving.service.service import InferenceService
from tests.support.servers import free_ports

KEY = (("authorization", "Bearer secret"),)


class StuckEngine:
    """Gives every request one token, and then stands still until it is released."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.steps = 0
        self.released = threading.Event()

    @property
    def has_work(self) -> bool:
        return bool(self.asked) and not self.released.is_set()

    def has_room(self, n: int, caller: str) -> bool:
        return True

    def add(self, request: Request) -> None:
        self.asked.append(request)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        pass

    def step(self, now: float) -> list[Event]:
        self.steps += 1
        if self.steps > 1:
            self.released.wait(20)
            return []
        token = Drawn(token_id=65)
        return [
            Event(request_id=asked.id, choice=0, drawn=token, finish_reason=None)
            for asked in self.asked
        ]


class NothingLate(LatePrograms):
    """No program is missing."""

    def __init__(self) -> None:
        pass

    def start(self) -> None:
        pass


async def serve(worker: EngineWorker, config: ServiceConfig) -> None:
    """Serves a toy model by this worker until the server ends."""
    info = pb.ModelInfo(name="toy", type="chat-completions", max_context=512, vocab_size=261)
    service = InferenceService(worker, ByteTokenizer(), info)
    access = Access(Keyring({"default": "secret"}))
    address = f"127.0.0.1:{config.port}"
    admission, fields = Admission(Accounts()), CallerFields(None)
    front = LocalFront(worker, service, address, access, None, admission, fields, 32)
    await _Server(worker, NothingLate(), None, config).run(lambda: front, "127.0.0.1")


def test_a_step_that_stands_still_ends_the_streams_the_health_and_the_beats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    monkeypatch.setenv(BEAT_VARIABLE, str(writing))
    engine = StuckEngine()
    worker = EngineWorker(engine, Metrics("toy"))
    worker.start()
    (port,) = free_ports(1)
    config = record(ServiceConfig, defaults(SERVICE, step_timeout=0.5, port=port))

    async def run() -> None:
        serving = asyncio.create_task(serve(worker, config))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await channel.channel_ready()
            request = health_pb2.HealthCheckRequest()
            watch = health_pb2_grpc.HealthStub(channel).Watch(request)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            asked = pb.GenerateRequest(text="hello", max_tokens=9)
            answer = rpc.InferenceStub(channel).Generate(asked, metadata=KEY)
            chunks = []
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for chunk in answer:
                    chunks.append(chunk)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "stood still" in str(caught.value.details())
            assert "".join(chunk.text for chunk in chunks) == "A"
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await asyncio.wait_for(serving, 10)

    asyncio.run(run())
    assert os.read(reading, 99).startswith(b"1")
    time.sleep(0.01)
    with pytest.raises(BlockingIOError):
        os.read(reading, 99)
    assert not worker.stop()  # it is not waited for, so the process ends with status 1
    engine.released.set()
    for descriptor in (reading, writing):
        os.close(descriptor)


def test_during_the_drain_delay_health_says_no_and_requests_are_served() -> None:
    """The delay of ten minutes ends with the engine."""
    engine = StuckEngine()
    engine.released.set()
    worker = EngineWorker(engine, Metrics("toy"))
    worker.start()
    (port,) = free_ports(1)
    config = record(ServiceConfig, defaults(SERVICE, drain_delay=600.0, port=port))
    states = health_pb2.HealthCheckResponse

    async def run() -> None:
        serving = asyncio.create_task(serve(worker, config))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await channel.channel_ready()
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == states.SERVING
            signal.raise_signal(signal.SIGTERM)
            assert (await watch.read()).status == states.NOT_SERVING
            stub = rpc.InferenceStub(channel)
            answer = stub.Generate(pb.GenerateRequest(text="hello", max_tokens=9), metadata=KEY)
            opening = await answer.read()  # the request is queued
            assert isinstance(opening, pb.GenerateChunk) and opening.prompt_tokens > 0
            answer.cancel()
            assert not serving.done()
            worker.abandon(EngineFailure("over"))  # which ends the delay
        await asyncio.wait_for(serving, 10)

    asyncio.run(run())
