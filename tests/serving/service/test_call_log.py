"""A line in the log for each call: who, which, how it ended; never a text."""

import asyncio
import logging
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import mixtral_jax
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.engine.build import compile_steps, engine_of
from serving.engine.metrics import Metrics
from serving.engine.worker import EngineWorker
from serving.errors import ERROR_METADATA
from serving.observe.logs import TextFormatter
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from serving.service.call_log import LOGGER
from tests.serving.service.test_service import KEY, LIMITS, chat, collect, serving


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[EngineWorker, Tokenizer]]:
    model, tokenizer = mixtral_jax.load("tiny-random", mesh=None)
    worker = EngineWorker(
        engine_of(model, LIMITS, compile_steps(model, LIMITS, has_masks=False)), Metrics("tiny")
    )
    worker.start()
    yield worker, tokenizer
    worker.stop()


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [vars(r)["mixtral_fields"] for r in caplog.records if r.name == LOGGER]


def test_a_line_for_each_call(
    parts: tuple[EngineWorker, Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)

    async def run() -> None:
        async with serving(parts) as channel:
            stub = rpc.InferenceStub(channel)
            metadata = (*KEY, ("x-request-id", "abc"))
            request = chat(max_tokens=3, ignore_eos=True, n=2)

            async def logged(number: int) -> None:
                # A line may come after the call's end, and so behind that of the next one.
                while len(lines(caplog)) < number:
                    await asyncio.sleep(0.01)

            chunks = [chunk async for chunk in stub.Generate(request, metadata=metadata)]
            await logged(1)
            assert chunks[0].prompt_tokens == chunks[-1].usage.prompt_tokens
            await stub.Tokenize(pb.TokenizeRequest(text="secret words"), metadata=KEY)
            await logged(2)
            for refused, key, number in (
                (chat(n=17), KEY, 3),
                (chat(), (("api-key", "wrong"),), 4),
            ):
                with pytest.raises(grpc.aio.AioRpcError):
                    async for _ in stub.Generate(refused, metadata=key):
                        pass
                await logged(number)
            call = stub.Generate(chat(max_tokens=400, ignore_eos=True), metadata=KEY)
            await call.read()
            call.cancel()
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            await logged(5)

    asyncio.run(asyncio.wait_for(run(), 30))
    written = lines(caplog)
    prompt = len(parts[1].chat([{"role": "user", "content": "hello"}]))
    inference = "/mixtral.v1.Inference/"
    for line in written:
        assert str(line.pop("peer")).startswith("ipv4:127.0.0.1:")
        assert float(str(line.pop("seconds"))) >= 0
    assert written[:4] == [
        {"id": "abc", "caller": "default", "method": f"{inference}Generate", "status": "OK",
         "prompt_tokens": prompt, "completion_tokens": 6},
        {"caller": "default", "method": f"{inference}Tokenize", "status": "OK"},
        {"caller": "default", "method": f"{inference}Generate", "status": "INVALID_ARGUMENT",
         "error": "InvalidParameter"},
        {"method": f"{inference}Generate", "status": "UNAUTHENTICATED", "error": "Unauthenticated"},
    ]  # fmt: skip
    assert written[4]["status"] == "CANCELLED"
    text = "\n".join(TextFormatter().format(record) for record in caplog.records)
    assert "hello" not in text and "secret" not in text


class Broken:
    """A tokenizer of which every use but the first ones raises."""

    def __init__(self, tokenizer: Tokenizer, error: BaseException) -> None:
        self._tokenizer, self._error = tokenizer, error

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def chat(self, *arguments: object, **options: object) -> list[int]:
        raise self._error

    def decode(self, ids: object) -> str:
        raise self._error


class Panic(BaseException):
    """What a panic of a library in Rust becomes."""


@pytest.mark.parametrize("error", [RuntimeError("/home/secret"), Panic("/home/secret")])
def test_what_a_tokenizer_raises_ends_its_request_alone(
    parts: tuple[EngineWorker, Tokenizer],
    error: BaseException,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The caller learns neither the exception's text nor its name; the log has both."""

    async def run() -> None:
        worker, tokenizer = parts
        broken: Tokenizer = Broken(tokenizer, error)  # type: ignore[assignment]
        async with serving((worker, broken)) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(channel, chat())
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details() == "the model's tokenizer cannot read this prompt"
            prompt = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), max_tokens=1)
            assert (await collect(channel, prompt))[-1].usage.completion_tokens == 1

    asyncio.run(run())
    assert "/home/secret" in caplog.text


def test_a_fault_of_ours_is_in_the_log_under_the_number_that_its_caller_has(
    parts: tuple[EngineWorker, Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> str:
        worker, tokenizer = parts
        broken: Tokenizer = Broken(tokenizer, RuntimeError("/home/secret"))  # type: ignore[assignment]
        async with serving((worker, broken)) as channel:
            stub = rpc.InferenceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Detokenize(pb.DetokenizeRequest(ids=[1]), metadata=KEY)
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert dict(caught.value.trailing_metadata())[ERROR_METADATA] == "EngineFailure"
            return str(caught.value.details())

    details = asyncio.run(run())
    assert "secret" not in details
    assert f"call failed: {details.rpartition(' ')[2]}" in caplog.text
    assert "/home/secret" in caplog.text
