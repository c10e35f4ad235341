"""Answers in a form and calls of tools over a real gRPC server, before a real engine."""

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import jsonschema
import pytest
from google.rpc import error_details_pb2, status_pb2

import mixtral_jax
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.specification import Grammar, Specification
from mixtral_jax.structure.trial import process
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.engine.build import compile_steps, engine_of
from serving.engine.metrics import Metrics
from serving.engine.worker import EngineWorker
from serving.errors import DETAILS_METADATA, ERROR_METADATA, WEAKENED_METADATA
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from serving.scheduling.step_plan import Limits
from serving.service.call_record import Calls
from serving.service.service import InferenceService, create_server
from tests.support.tools import TOOLS, WEATHER

KEY = (("authorization", "Bearer secret"),)
ACCESS = Access(Keyring({"default": "secret", "other": "another"}))
LIMITS = Limits(
    num_pages=192,
    page_size=16,
    max_sequences=4,
    max_step_tokens=64,
    max_context=1024,
    max_waiting=40,
)
WILD = pb.SamplingParams(temperature=1.5, seed=7)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "kind", "age", "tags"],
    "additionalProperties": False,
}
# What is asked for of uniqueItems is not enforced: two of one value are an answer, and wrong.
TWICE = {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
Parts = tuple[EngineWorker, Tokenizer, Compiler, Metrics]


@pytest.fixture(scope="module")
def patient() -> Iterator[None]:
    """A busy machine may take seconds to try a grammar that it compiles in milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "LONGEST_TRIAL", 60.0)
        patch.setattr(process, "LONGEST_CHECK", 60.0)
        yield


@pytest.fixture(scope="module")
def parts(patient: None) -> Iterator[Parts]:
    model, tokenizer = mixtral_jax.load("tiny-random", mesh=None)
    engine = engine_of(model, LIMITS, compile_steps(model, LIMITS))
    metrics = Metrics("tiny")
    worker = EngineWorker(engine, metrics)
    worker.start()
    with Compiler(tokenizer, model.config.vocab_size) as compiler:
        yield worker, tokenizer, compiler, metrics
    worker.stop()


@asynccontextmanager
async def serving(
    parts: Parts, compiler: Compiler | None = None
) -> AsyncIterator[rpc.InferenceStub]:
    worker, tokenizer, own, metrics = parts
    info = pb.ModelInfo(name="toy", type="chat-completions", max_context=1024, vocab_size=261)
    calls = Calls(metrics)
    service = InferenceService(worker, tokenizer, info, calls, compiler=compiler or own)
    server, port, _ = await create_server("127.0.0.1:0", service, ACCESS)
    async with asyncio.timeout(120):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield rpc.InferenceStub(channel)
    await server.stop(0)


def chat(*, tools: bool = False, **fields: Any) -> pb.GenerateRequest:
    asked = pb.Chat(messages=[pb.ChatMessage(role="user", content="hello")])
    if tools:
        for tool in TOOLS:
            asked.tools.add(
                name=tool.name, description=tool.description, parameters=tool.parameters
            )
        asked.tool_choice.mode = pb.ToolChoice.MODE_REQUIRED
    return pb.GenerateRequest(chat=asked, sampling=WILD, **fields)


def schema(value: Any, strict: bool = False) -> pb.ResponseFormat:
    return pb.ResponseFormat(json_schema=json.dumps(value), strict=strict)


async def collect(stub: Any, request: pb.GenerateRequest) -> list[pb.GenerateChunk]:
    return [chunk async for chunk in stub.Generate(request, metadata=KEY)]


def texts(chunks: list[pb.GenerateChunk]) -> dict[int, str]:
    """The text of each choice that has ended whole."""
    found: dict[int, str] = {}
    for chunk in chunks:
        found[chunk.choice] = found.get(chunk.choice, "") + chunk.text
    whole = [c.choice for c in chunks if c.finish_reason == pb.FINISH_REASON_STOP]
    return {choice: found[choice] for choice in whole}


def test_answers_match_what_was_asked_for(parts: Parts) -> None:
    """A model of random weights, at a temperature at which it writes anything else."""

    async def run() -> None:
        async with serving(parts) as stub:
            form = schema(SCHEMA, strict=True)
            chunks = await collect(stub, chat(response_format=form, max_tokens=400, n=4))
            whole = texts(chunks)
            assert len(whole) == 4
            for text in whole.values():
                jsonschema.validate(json.loads(text), SCHEMA)
            ids = sum(len(chunk.token_ids) for chunk in chunks)
            assert chunks[-1].usage.completion_tokens == ids  # forced ones are among them
            form = pb.ResponseFormat(regex="[a-f]{3}-[0-9]{2}")
            (text,) = texts(await collect(stub, chat(response_format=form))).values()
            assert re.fullmatch("[a-f]{3}-[0-9]{2}", text)
            form = pb.ResponseFormat(choice=pb.Texts(texts=["yes", "no"]))
            (text,) = texts(await collect(stub, chat(response_format=form))).values()
            assert text in ("yes", "no")
            # Neither what ends an answer late nor what never does breaks the form.
            held = chat(response_format=form, ignore_eos=True, min_tokens=20, max_tokens=40)
            (text,) = texts(await collect(stub, held)).values()
            assert text in ("yes", "no")

    asyncio.run(run())


def test_allowed_ids_and_a_form_hold_together_or_are_refused(parts: Parts) -> None:
    async def run() -> None:
        async with serving(parts) as stub:
            form = pb.ResponseFormat(regex="[a-f]{3}-[0-9]{2}")
            few = {"response_format": form, "allowed_token_ids": list(b"abc-12")}
            (text,) = texts(await collect(stub, chat(**few))).values()
            assert re.fullmatch("[abc]{3}-[12]{2}", text)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await collect(stub, chat(response_format=form, allowed_token_ids=list(b"abc12")))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert str(refused.value.details()).startswith("allowed_token_ids has no token that")

    asyncio.run(run())


def test_a_cut_answer_says_so(parts: Parts) -> None:
    async def run() -> None:
        async with serving(parts) as stub:
            form = schema(SCHEMA)
            for cut in ({"max_tokens": 5}, {"stop": ['"kind"']}, {"stop_token_ids": [ord("k")]}):
                chunks = await collect(stub, chat(response_format=form, **cut))
                assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH

    asyncio.run(run())


def test_logprobs_go_with_forced_tokens_too(parts: Parts) -> None:
    async def run() -> None:
        async with serving(parts) as stub:
            form = pb.ResponseFormat(choice=pb.Texts(texts=["yesterday", "no"]))
            chunks = await collect(stub, chat(response_format=form, top_logprobs=2))
            logprobs = [entry for chunk in chunks for entry in chunk.logprobs]
            assert [e.token_id for e in logprobs] == [i for c in chunks for i in c.token_ids]
            assert all(-1e9 < entry.logprob <= 0 for entry in logprobs)

    asyncio.run(run())


def test_calls_are_whole_and_valid(parts: Parts) -> None:
    async def run() -> None:
        async with serving(parts) as stub:
            request = chat(tools=True, max_tokens=400)
            chunks = await collect(stub, request)
            calls = [call for chunk in chunks for call in chunk.tool_calls]
            assert calls and chunks[-1].finish_reason in (
                pb.FINISH_REASON_TOOL_CALLS,
                pb.FINISH_REASON_LENGTH,
            )
            assert "".join(chunk.text for chunk in chunks) == ""
            parameters = {tool.name: json.loads(tool.parameters) for tool in TOOLS}
            for call in calls:
                jsonschema.validate(json.loads(call.arguments), parameters[call.name])
                assert re.fullmatch("[a-zA-Z0-9]{9}", call.id)
            request.chat.tool_choice.allowed.append(WEATHER.name)
            request.chat.parallel_tool_calls = False
            request.max_tokens = 400
            chunks = await collect(stub, request)
            (call,) = [call for chunk in chunks for call in chunk.tool_calls]
            assert call.name == WEATHER.name
            assert chunks[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS

    asyncio.run(run())


def test_tokenize_counts_tools(parts: Parts) -> None:
    async def run() -> None:
        async with serving(parts) as stub:
            asked = chat(tools=True).chat
            tokens = await stub.Tokenize(pb.TokenizeRequest(chat=asked), metadata=KEY)
            messages: Any = [{"role": "user", "content": "hello"}]
            assert list(tokens.ids) == parts[1].chat(messages, tools=TOOLS)
            chunks = await collect(stub, chat(tools=True, max_tokens=1))
            assert chunks[-1].usage.prompt_tokens == len(tokens.ids)

    asyncio.run(run())


def test_a_form_that_cannot_be_is_refused_with_its_pointer(parts: Parts) -> None:
    async def run() -> None:
        async with serving(parts) as stub:
            wrong = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=b)"}}}
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(stub, chat(response_format=schema(wrong, strict=True)))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            trailing = dict(caught.value.trailing_metadata())
            assert trailing[ERROR_METADATA] == "InvalidParameter"
            bad = error_details_pb2.BadRequest()
            (detail,) = status_pb2.Status.FromString(trailing[DETAILS_METADATA]).details
            assert detail.Unpack(bad)
            (violation,) = bad.field_violations
            assert violation.field == "response_format.json_schema#/properties/a/pattern"
            assert violation.description == caught.value.details()
            assert "pattern" in violation.description

    asyncio.run(run())


def test_what_is_not_enforced_is_told_first_and_checked_last(parts: Parts) -> None:
    async def run() -> None:
        async with serving(parts) as stub:
            metrics = parts[3].registry
            name = "mixtral_structure_violations_total"
            before = metrics.get_sample_value(name, {"model_name": "tiny"})
            call = stub.Generate(chat(response_format=schema(TWICE)), metadata=KEY)
            chunks = [await call.read()]
            weakened = dict(await call.initial_metadata())[WEAKENED_METADATA]
            assert "uniqueItems" in weakened and chunks[0].prompt_tokens
            while isinstance(chunk := await call.read(), pb.GenerateChunk):
                chunks.append(chunk)
            assert json.loads(texts(chunks)[0]) == [1, 1]
            assert chunks[-1].violation == "the answer: two items are equal"
            assert metrics.get_sample_value(name, {"model_name": "tiny"}) == before + 1
            call = stub.Generate(chat(response_format=schema({"const": 1})), metadata=KEY)
            chunks = [chunk async for chunk in call]
            assert WEAKENED_METADATA not in dict(await call.initial_metadata())
            assert not chunks[-1].violation

    asyncio.run(run())


def test_the_server_tells_what_it_can(parts: Parts) -> None:
    async def run() -> None:
        async with serving(parts) as stub:
            info = await stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=KEY)
            assert {"json_schema", "regex", "tools"} <= set(info.capabilities)

    asyncio.run(run())


class Standing(Compiler):
    """Stands still for one expression, and panics for another."""

    def __init__(self, inner: Compiler) -> None:
        self._inner = inner
        self.go_on = threading.Event()
        self.standing = 0

    def compile(self, wanted: Specification | Grammar, *, continues: bool, salt: bytes) -> Form:
        if isinstance(wanted, Specification) and wanted.text == "slow":
            self.standing += 1
            self.go_on.wait(60)
        if isinstance(wanted, Specification) and wanted.text == "panic":
            raise BaseException("a panic of Rust")
        return self._inner.compile(wanted, continues=continues, salt=salt)


def test_thirty_slow_grammars_of_a_caller_hold_up_nobody_else(parts: Parts) -> None:
    async def run() -> None:
        compiler = Standing(parts[2])
        async with serving(parts, compiler) as stub:
            slow = chat(response_format=pb.ResponseFormat(regex="slow"), max_tokens=9)
            attack = [asyncio.create_task(collect(stub, slow)) for _ in range(30)]
            while not compiler.standing:
                await asyncio.sleep(0.01)
            other = (("authorization", "Bearer another"),)
            form = pb.ResponseFormat(regex="[a-c]{2}")
            for request in (chat(response_format=form), chat(max_tokens=3)):
                answer = [chunk async for chunk in stub.Generate(request, metadata=other)]
                assert answer[-1].HasField("usage")
            # The attacker's own plain requests go on too.
            assert (await collect(stub, chat(max_tokens=3)))[-1].HasField("usage")
            assert compiler.standing == 1
            compiler.go_on.set()
            for chunks in await asyncio.gather(*attack):
                assert texts(chunks)[0] == "slow"

    asyncio.run(run())


def test_a_panic_of_the_compiler_ends_one_request_alone(parts: Parts) -> None:
    async def run() -> None:
        async with serving(parts, Standing(parts[2])) as stub:
            panic = chat(response_format=pb.ResponseFormat(regex="panic"))
            with pytest.raises(grpc.aio.AioRpcError, match="cannot be compiled; simplify it"):
                await collect(stub, panic)
            form = pb.ResponseFormat(regex="[a-c]{2}")
            assert re.fullmatch(
                "[a-c]{2}", texts(await collect(stub, chat(response_format=form)))[0]
            )

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"json_schema": " " * (2**18 + 1)}, "json_schema has 262,145 bytes"),
        ({"regex": "a" * (2**16 + 1)}, "regex has 65,537 bytes"),
        ({"lark": "a" * (2**16 + 1)}, "lark has 65,537 bytes"),
        ({"choice": pb.Texts(texts=["a"] * 5000)}, "texts has 5,000 texts"),
    ],
)
def test_what_is_too_large_is_not_compiled(parts: Parts, fields: Any, words: str) -> None:
    async def run() -> None:
        compiler = Standing(parts[2])
        async with serving(parts, compiler) as stub:
            with pytest.raises(grpc.aio.AioRpcError, match=words):
                await collect(stub, chat(response_format=pb.ResponseFormat(**fields)))

    asyncio.run(run())
