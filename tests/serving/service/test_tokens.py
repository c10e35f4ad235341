"""Tokenize, Detokenize and GetMetrics over gRPC, the ends of chats, and the ids of a prompt."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest

import mixtral_jax
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.access.credentials import Access
from serving.access.key_file import KeyFile
from serving.access.keyring import Keyring
from serving.engine.build import compile_steps, engine_of
from serving.engine.metrics import Metrics
from serving.engine.worker import EngineWorker
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from serving.scheduling.step_plan import Limits
from serving.service.call_record import Calls
from serving.service.service import InferenceService, create_server

KEY = (("authorization", "Bearer secret"),)
LIMITS = Limits(
    num_pages=16, page_size=16, max_sequences=1, max_step_tokens=32, max_context=256, max_waiting=2
)
HELLO = [*b"hi"]
USER, EOS, ASSISTANT = 259, 257, 260  # of the tokenizer of bytes; 256 begins a text


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[EngineWorker, Tokenizer]]:
    model, tokenizer = mixtral_jax.load("tiny-random", mesh=None)
    engine = engine_of(model, LIMITS, compile_steps(model, LIMITS, has_masks=False))
    worker = EngineWorker(engine, Metrics("tiny"))
    worker.start()
    yield worker, tokenizer
    worker.stop()


@asynccontextmanager
async def serving(
    parts: tuple[EngineWorker, Tokenizer], access: Access | None = None
) -> AsyncIterator[rpc.InferenceStub]:
    info = pb.ModelInfo(name="toy", type="chat-completions", max_context=256, vocab_size=261)
    service = InferenceService(*parts, info, Calls(Metrics("toy")))
    access = access or Access(Keyring({"default": "secret"}))
    server, port, _ = await create_server("127.0.0.1:0", service, access)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield rpc.InferenceStub(channel)
    await server.stop(0)


def chat(*turns: tuple[str, str], **fields: object) -> pb.Chat:
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.Chat(messages=messages, **fields)


def test_texts_and_chats_become_the_ids_that_generate_reads(
    parts: tuple[EngineWorker, Tokenizer],
) -> None:
    user, begun = ("user", "hi"), ("assistant", "so")
    asked = {
        "a text": (pb.TokenizeRequest(text="hi"), [256, *HELLO]),
        "its own ids": (pb.TokenizeRequest(text="hi", add_special_tokens=False), HELLO),
        "nothing": (pb.TokenizeRequest(text="", add_special_tokens=False), []),
        "a chat": (
            pb.TokenizeRequest(chat=chat(user)),
            [256, USER, *HELLO, EOS, ASSISTANT],
        ),
        "a closed chat": (
            pb.TokenizeRequest(chat=chat(user, add_generation_prompt=False)),
            [256, USER, *HELLO, EOS],
        ),
        "an open turn": (
            pb.TokenizeRequest(chat=chat(user, begun, continue_last=True)),
            [256, USER, *HELLO, EOS, ASSISTANT, *b"so"],
        ),
    }

    async def run() -> None:
        async with serving(parts) as stub:
            for name, (request, ids) in asked.items():
                tokens = await stub.Tokenize(request, metadata=KEY)
                assert list(tokens.ids) == ids, name
                pieces = [bytes([i]) if i < 256 else b"" for i in ids]
                assert list(tokens.pieces) == pieces, name
            text = await stub.Detokenize(pb.DetokenizeRequest(ids=[256, *HELLO]), metadata=KEY)
            assert text.text == "hi"
            both = chat(user, begun, continue_last=True, add_generation_prompt=True)
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await stub.Tokenize(pb.TokenizeRequest(chat=both), metadata=KEY)
            assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "are both true" in (failed.value.details() or "")

    asyncio.run(run())


def test_generate_returns_the_ids_of_its_prompt_where_they_are_asked_for(
    parts: tuple[EngineWorker, Tokenizer],
) -> None:
    async def run() -> None:
        async with serving(parts) as stub:
            for returns in (True, False):
                request = pb.GenerateRequest(
                    chat=chat(("user", "hi"), add_generation_prompt=False),
                    max_tokens=2,
                    return_prompt_ids=returns,
                )
                chunks = [chunk async for chunk in stub.Generate(request, metadata=KEY)]
                ids = [256, USER, *HELLO, EOS] if returns else []
                assert list(chunks[0].prompt_ids) == ids
                assert chunks[0].prompt_tokens == 5
                assert not any(chunk.prompt_ids for chunk in chunks[1:])

    asyncio.run(run())


def test_the_ids_of_a_prompt_beyond_the_context_are_refused(
    parts: tuple[EngineWorker, Tokenizer],
) -> None:
    async def run() -> None:
        async with serving(parts) as stub:
            info = await stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=KEY)
            request = pb.GenerateRequest(max_tokens=0, return_prompt_ids=True)
            request.text = "a" * (info.max_context - 1)  # and bos
            (first, last) = [chunk async for chunk in stub.Generate(request, metadata=KEY)]
            assert len(first.prompt_ids) == last.usage.prompt_tokens == info.max_context
            request.text += "a"
            with pytest.raises(
                grpc.aio.AioRpcError, match=f"the prompt has {info.max_context + 1}"
            ):
                [chunk async for chunk in stub.Generate(request, metadata=KEY)]

    asyncio.run(run())


def test_metrics_are_for_operators(
    parts: tuple[EngineWorker, Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    other = KeyFile(file).add("alice")

    async def run() -> None:
        access = Access(Keyring({"default": "secret"}, KeyFile(file)))
        async with serving(parts, access) as stub:
            answer = await stub.GetMetrics(pb.GetMetricsRequest(), metadata=KEY)
            assert b'vllm:generation_tokens_total{model_name="toy"} 0.0' in answer.text
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                metadata = (("authorization", f"Bearer {other}"),)
                await stub.GetMetrics(pb.GetMetricsRequest(), metadata=metadata)
            assert failed.value.code() is grpc.StatusCode.PERMISSION_DENIED

    asyncio.run(run())
