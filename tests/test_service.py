"""A real gRPC server around a real engine with a toy model."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import mixtral_jax
from mixtral_jax.tokenizer import Tokenizer
from serving.engine import Engine, compile_steps
from serving.errors import ERROR_METADATA
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from serving.scheduler import Limits
from serving.service import InferenceService, create_server
from serving.worker import EngineWorker

KEY = (("authorization", "Bearer secret"),)
LIMITS = Limits(
    num_pages=64, page_size=16, max_sequences=2, max_step_tokens=32, max_context=512, max_waiting=2
)


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[EngineWorker, Tokenizer]]:
    model, tokenizer = mixtral_jax.load("tiny-random")
    worker = EngineWorker(Engine(model, LIMITS, compile_steps(model, LIMITS)))
    worker.start()
    yield worker, tokenizer
    worker.stop()


@asynccontextmanager
async def serving(parts: tuple[EngineWorker, Tokenizer]) -> AsyncIterator[grpc.aio.Channel]:
    info = pb.ModelInfo(name="toy", type="chat-completions", max_context=512, vocab_size=261)
    service = InferenceService(*parts, info)
    server, port, _ = await create_server("127.0.0.1:0", service, "secret")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


def chat(**fields: object) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role="user", content="hello")]
    return pb.GenerateRequest(chat=pb.Chat(messages=messages), **fields)


async def collect(channel: grpc.aio.Channel, request: pb.GenerateRequest) -> list[pb.GenerateChunk]:
    return [chunk async for chunk in rpc.InferenceStub(channel).Generate(request, metadata=KEY)]


def test_a_stream_adds_up_and_a_seed_repeats_it(parts: tuple[EngineWorker, Tokenizer]) -> None:
    async def run() -> None:
        async with serving(parts) as channel:
            request = chat(max_tokens=12, sampling=pb.SamplingParams(seed=3))
            chunks = await collect(channel, request)
            ids = [i for chunk in chunks for i in chunk.token_ids]
            prompt = len(parts[1].chat([{"role": "user", "content": "hello"}]))
            assert len(ids) == 12 or ids[-1] in parts[1].eos_ids
            assert "".join(chunk.text for chunk in chunks) == parts[1].decode(ids)
            assert [c.finish_reason for c in chunks[:-1]] == [0] * (len(chunks) - 1)
            reason = pb.FINISH_REASON_LENGTH if len(ids) == 12 else pb.FINISH_REASON_STOP
            assert chunks[-1].finish_reason == reason
            assert chunks[-1].usage == pb.Usage(prompt_tokens=prompt, completion_tokens=len(ids))
            again = await collect(channel, request)
            assert [i for chunk in again for i in chunk.token_ids] == ids

    asyncio.run(run())


def test_a_stop_text_ends_the_stream_before_it(parts: tuple[EngineWorker, Tokenizer]) -> None:
    async def run() -> None:
        async with serving(parts) as channel:
            sampling = pb.SamplingParams(temperature=0)
            whole = "".join(
                chunk.text
                for chunk in await collect(channel, chat(max_tokens=40, sampling=sampling))
            )
            stop = whole[5:7]
            chunks = await collect(channel, chat(max_tokens=40, sampling=sampling, stop=[stop]))
            assert "".join(chunk.text for chunk in chunks) == whole[: whole.find(stop)]
            assert chunks[-1].finish_reason == pb.FINISH_REASON_STOP

    asyncio.run(run())


@pytest.mark.parametrize(
    ("request_", "leaf", "text"),
    [
        (pb.GenerateRequest(), "InvalidRequest", "prompt is missing"),
        (chat(max_tokens=0), "InvalidParameter", "max_tokens is 0"),
        (chat(stop=[""]), "InvalidParameter", "empty text"),
        (chat(sampling=pb.SamplingParams(temperature=3)), "InvalidParameter", "temperature is 3"),
        (chat(sampling=pb.SamplingParams(top_p=-1)), "InvalidParameter", "top_p is -1"),
        (
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="king", content="x")])),
            "InvalidRequest",
            "role 'king'",
        ),
        (
            pb.GenerateRequest(
                chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="x" * 10_000)])
            ),
            "ContextTooLong",
            "10,000 bytes; the 512 tokens",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[261])),
            "InvalidRequest",
            "ids are below 261",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 600)),
            "ContextTooLong",
            "the prompt has 600 tokens",
        ),
    ],
)
def test_bad_requests(
    parts: tuple[EngineWorker, Tokenizer], request_: pb.GenerateRequest, leaf: str, text: str
) -> None:
    async def run() -> None:
        async with serving(parts) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(channel, request_)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert dict(caught.value.trailing_metadata())[ERROR_METADATA] == leaf
            assert text in caught.value.details()

    asyncio.run(run())


def test_keys(parts: tuple[EngineWorker, Tokenizer]) -> None:
    async def run() -> None:
        async with serving(parts) as channel:
            stub = rpc.InferenceStub(channel)
            for metadata in ((), (("authorization", "Bearer wrong"),), (("api-key", ""),)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in stub.Generate(chat(), metadata=metadata):
                        pass
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            metadata = (("api-key", "secret"),)
            info = await stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata)
            assert info.name == "toy"
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    asyncio.run(run())


def test_a_full_queue_is_refused_and_leaving_frees(parts: tuple[EngineWorker, Tokenizer]) -> None:
    """Two run and two wait; of twelve that come at once, some are refused. No page stays held."""

    async def run() -> None:
        async with serving(parts) as channel:
            stub = rpc.InferenceStub(channel)
            request = chat(max_tokens=400, sampling=pb.SamplingParams(temperature=0))
            calls = [stub.Generate(request, metadata=KEY) for _ in range(12)]
            first = await asyncio.gather(*(call.read() for call in calls), return_exceptions=True)
            refused = [item for item in first if isinstance(item, grpc.aio.AioRpcError)]
            assert refused
            assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert "are waiting already" in str(refused[0].details())
            assert len(refused) < len(first)
            for call in calls:
                call.cancel()
            scheduler = parts[0]._engine.scheduler
            while scheduler.has_work:
                await asyncio.sleep(0.01)
            assert scheduler.num_free_pages == LIMITS.num_pages

    asyncio.run(asyncio.wait_for(run(), 60))
