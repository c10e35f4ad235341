"""The Python client, both kinds, before a real service with the toy model."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

import mixtral_jax
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.client import AsyncClient, Client
from serving.client.types import Completion, Delta, Message, ModelInfo, completion_of
from serving.engine.build import compile_steps, engine_of
from serving.engine.metrics import Metrics
from serving.engine.worker import EngineWorker
from serving.errors import (
    DeadlineExceeded,
    EngineFailure,
    Forbidden,
    InvalidParameter,
    InvalidRequest,
    RequestTooLarge,
    ServingError,
    Unauthenticated,
    Unavailable,
)
from serving.proto import inference_pb2 as pb
from serving.scheduling.step_plan import Limits
from serving.service.service import InferenceService, create_server

HELLO: list[Message] = [{"role": "user", "content": "hello"}]
LIMITS = Limits(
    num_pages=64, page_size=16, max_sequences=2, max_step_tokens=32, max_context=512, max_waiting=2
)
PATIENCE = 20.0


class Running:
    """A service in a thread of its own, with keys "operator" and "user"."""

    def __init__(self, model: Any, tokenizer: Tokenizer, steps: Any) -> None:
        self.tokenizer = tokenizer
        self.engine = engine_of(model, LIMITS, steps)
        self.worker = EngineWorker(self.engine, Metrics("toy"))
        self.target = ""
        self._is_up = threading.Event()
        self._end: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> "Running":
        self.worker.start()
        self._thread.start()
        assert self._is_up.wait(PATIENCE)
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        self._thread.join()
        self.worker.stop()

    def is_idle(self) -> bool:
        scheduler = self.engine.scheduler
        return not scheduler.has_work and scheduler.num_free_pages == LIMITS.num_pages

    async def _serve(self) -> None:
        end, loop = asyncio.Event(), asyncio.get_running_loop()
        self._end = lambda: loop.call_soon_threadsafe(end.set)
        info = pb.ModelInfo(
            name="toy", type="chat-completions", provider="us", max_context=512, vocab_size=261
        )
        service = InferenceService(self.worker, self.tokenizer, info)
        access = Access(Keyring({"default": "operator", "joe": "user"}))
        server, port, _ = await create_server("127.0.0.1:0", service, access)
        self.target = f"127.0.0.1:{port}"
        self._is_up.set()
        await end.wait()
        await server.stop(0)


@pytest.fixture(scope="module")
def toy() -> tuple[Any, Tokenizer, Any]:
    model, tokenizer = mixtral_jax.load("tiny-random", mesh=None)
    return model, tokenizer, compile_steps(model, LIMITS)


@pytest.fixture(scope="module")
def running(toy: tuple[Any, Tokenizer, Any]) -> Iterator[Running]:
    with Running(*toy) as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(running.target, key="user") as client:
        yield client


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def asynchronously(running: Running, work: Callable[[AsyncClient], Any], key: str = "user") -> Any:
    async def run() -> Any:
        async with AsyncClient(running.target, key=key) as client:
            return await work(client)

    return asyncio.run(run())


def test_a_chat_streams_and_adds_up_to_the_whole_answer(client: Client, running: Running) -> None:
    options: Any = {"max_tokens": 20, "seed": 5, "temperature": 1.0}
    deltas = list(client.chat(HELLO, **options))
    assert all(isinstance(delta, Delta) for delta in deltas)
    assert [delta.usage for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    whole = client.complete(HELLO, **options)
    assert whole == completion_of(deltas)
    assert whole.text == "".join(delta.text for delta in deltas)
    assert whole.finish_reason in ("stop", "length")
    prompt = running.tokenizer.chat(HELLO)
    assert whole.usage.prompt_tokens == len(prompt)
    assert whole.usage.completion_tokens == len(whole.choices[0].token_ids)

    async def work(other: AsyncClient) -> tuple[list[Delta], Completion]:
        return [d async for d in other.chat(HELLO, **options)], await other.complete(
            HELLO, **options
        )

    # How many tokens come in one chunk depends on how fast they are read.
    others, other_whole = asynchronously(running, work)
    assert completion_of(others) == other_whole == whole


def test_every_option_arrives(client: Client) -> None:
    answer = client.complete(
        HELLO,
        max_tokens=6,
        temperature=0,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=3,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        repetition_penalty=1.1,
        logit_bias={70: 100.0},
        stop="zz",
        n=2,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[99],
        top_logprobs=2,
        timeout=PATIENCE,
    )
    assert [choice.text for choice in answer.choices] == ["FFFFFF"] * 2  # byte 70
    for choice in answer.choices:
        assert choice.token_ids == [70] * 6 and choice.finish_reason == "length"
        assert [(one.token_id, one.token, len(one.top)) for one in choice.logprobs] == [
            (70, b"F", 2)
        ] * 6
    assert answer.usage.completion_tokens == 12
    stopped = client.complete(HELLO, temperature=0, logit_bias={70: 100.0}, stop=["FFF"])
    assert (stopped.text, stopped.finish_reason) == ("", "stop")
    assert stopped.choices[0].stop_reason == "FFF"
    kept = client.complete(
        HELLO, temperature=1, allowed_token_ids=[70], stop=["FFF"], include_stop=True
    )
    assert (kept.text, kept.choices[0].stop_reason) == ("FFF", "FFF")
    ended = client.complete(HELLO, allowed_token_ids=[70, 71], stop_token_ids=[70, 71])
    (choice,) = ended.choices
    assert choice.token_ids == [choice.stop_reason] and choice.finish_reason == "stop"
    whole = client.complete(HELLO, allowed_token_ids=[70], max_tokens=2)
    assert whole.text == "FF" and whole.choices[0].stop_reason is None


def test_texts_ids_and_answers_that_were_begun_are_continued(client: Client) -> None:
    greedy: Any = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}
    by_text = client.complete("once upon", **greedy)
    ids = client.tokenize("once upon").ids
    assert ids == (256, *b"once upon")
    assert client.complete(ids, **greedy) == by_text
    assert completion_of(client.generate("once upon", **greedy)) == by_text
    begun: list[Message] = [*HELLO, {"role": "assistant", "content": "once upon"}]
    ids = client.tokenize(begun, continue_last=True).ids
    assert ids == (256, 259, *b"hello", 257, 260, *b"once upon")
    answer = client.complete(begun, continue_last=True, **greedy)
    assert answer == client.complete(ids, **greedy)
    assert answer == completion_of(client.chat(begun, continue_last=True, **greedy))
    with pytest.raises(InvalidRequest, match="cannot be continued"):
        client.complete(HELLO, continue_last=True)
    with pytest.raises(InvalidRequest, match="the chat is empty"):
        client.complete([])


def test_text_to_tokens_and_back(client: Client, running: Running) -> None:
    tokens = client.tokenize(HELLO)
    assert tokens.ids == tuple(running.tokenizer.chat(HELLO))
    assert b"".join(tokens.pieces) == b"hello" and tokens.pieces[0] == b""
    euro = client.tokenize("€").ids
    assert client.detokenize(euro) == "€"
    assert client.detokenize(euro[:-1]) == "\ufffd"
    assert client.detokenize([]) == ""
    with pytest.raises(InvalidParameter, match="ids holds 261; ids are below 261"):
        client.detokenize([261])
    with pytest.raises(InvalidRequest, match="reduce the length"):
        client.tokenize("a" * 10_000)

    async def work(other: AsyncClient) -> object:
        return await other.tokenize(HELLO), await other.detokenize(euro)

    assert asynchronously(running, work) == (tokens, "€")


def test_info(client: Client, running: Running) -> None:
    info = ModelInfo(
        name="toy", type="chat-completions", provider="us", max_context=512, vocab_size=261
    )
    assert client.info() == info
    assert asynchronously(running, lambda other: other.info()) == info


def test_wrong_arguments_are_told_before_anything_is_sent() -> None:
    with Client("127.0.0.1:1") as client:
        ask: Any = client.chat
        with pytest.raises(TypeError, match="'max_token' is no option .* max_tokens"):
            ask(HELLO, max_token=3)
        with pytest.raises(ValueError, match="max_tokens cannot be -1"):
            ask(HELLO, max_tokens=-1)
        with pytest.raises(TypeError, match="temperature cannot be 'hot'"):
            ask(HELLO, temperature="hot")
        with pytest.raises(TypeError, match=r"messages\[0\] must be a dictionary of 'role' and"):
            ask(["hello"])
        with pytest.raises(TypeError, match="continue_last is for chats"):
            client.complete("a", continue_last=True)


def test_errors_are_those_of_the_tree(running: Running, client: Client) -> None:
    with Client(running.target, key="wrong") as other, pytest.raises(Unauthenticated):
        other.info()
    with Client(running.target) as other, pytest.raises(Unauthenticated):
        list(other.chat(HELLO))
    with pytest.raises(InvalidParameter, match="top_p is 2"):
        list(client.chat(HELLO, top_p=2))
    with pytest.raises(DeadlineExceeded):
        client.complete(HELLO, max_tokens=400, ignore_eos=True, timeout=0.1)
    with pytest.raises(RequestTooLarge, match="larger than max"):
        client.complete("a" * (9 * 2**20))
    with pytest.raises(Forbidden, match="Drain is for the operators' keys"):
        client.drain()
    with Client("127.0.0.1:1", key="user") as other, pytest.raises(Unavailable):
        other.info()

    async def fail(other: AsyncClient) -> list[type[ServingError]]:
        found = []
        for work in (
            lambda: other.complete(HELLO, top_p=2),
            lambda: other.complete(HELLO, max_tokens=400, ignore_eos=True, timeout=0.1),
            lambda: other.drain(),
        ):
            with pytest.raises(ServingError) as caught:
                await work()
            found.append(type(caught.value))
        return found

    assert asynchronously(running, fail) == [InvalidParameter, DeadlineExceeded, Forbidden]
    wait_for(running.is_idle)


def test_an_answer_without_its_end_is_a_failure() -> None:
    with pytest.raises(EngineFailure, match="without a reason"):
        completion_of([])


def test_leaving_the_iterator_cancels(running: Running, client: Client) -> None:
    for delta in client.chat(HELLO, max_tokens=400, ignore_eos=True):
        assert delta.usage is None
        break
    wait_for(running.is_idle)

    async def leave(other: AsyncClient) -> None:
        async for _ in other.chat(HELLO, max_tokens=400, ignore_eos=True):
            break
        while not running.is_idle():
            await asyncio.sleep(0.01)

    asynchronously(running, leave)


def test_closing_the_client_ends_its_answers(running: Running) -> None:
    with Client(running.target, key="user") as client:
        answer = client.chat(HELLO, max_tokens=400, ignore_eos=True)
        next(answer)
    with pytest.raises(Unavailable, match="closed"):
        list(answer)
    wait_for(running.is_idle)


def test_drain_lets_answers_finish_and_refuses_new_ones(toy: tuple[Any, Tokenizer, Any]) -> None:
    with Running(*toy) as running, Client(running.target, key="operator") as client:
        steps = threading.Semaphore(30)  # fewer than the answer needs: it goes on while we ask
        running.engine.on_step = lambda num_tokens: steps.acquire(timeout=PATIENCE)
        answer = client.chat(HELLO, max_tokens=60, ignore_eos=True)
        seen = [next(answer)]
        assert client.drain() == 1
        with pytest.raises(Unavailable, match="shutting down"):
            client.complete(HELLO)
        steps.release(100)
        seen += answer
        assert completion_of(seen).usage.completion_tokens == 60


def test_reflection_shows_the_contract(running: Running) -> None:
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    class WithKey(grpc.StreamStreamClientInterceptor):
        def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
            return continuation(details._replace(metadata=[("api-key", "user")]), requests)

    with grpc.insecure_channel(running.target) as channel:
        database = ProtoReflectionDescriptorDatabase(grpc.intercept_channel(channel, WithKey()))
        assert set(database.get_services()) == {
            "mixtral.v1.Inference",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        file = database.FindFileContainingSymbol("mixtral.v1.Inference")
        assert [method.name for method in file.service[0].method][:2] == [
            "Generate",
            "GetModelInfo",
        ]


@pytest.mark.parametrize(
    ("symbol", "answer"),
    [
        ("mixtral.v1.Inference", "file_descriptor_response"),
        ("mixtral.v1.Inference.Generate", "file_descriptor_response"),
        ("mixtral.v1.Inference.Drain", "file_descriptor_response"),
        ("mixtral.v1.Usage.prompt_tokens", "file_descriptor_response"),
        ("grpc.health.v1.Health.Watch", "file_descriptor_response"),
        ("mixtral.v1.Inference.Nothing", "error_response"),
        ("nothing", "error_response"),
    ],
)
def test_reflection_describes_every_symbol(running: Running, symbol: str, answer: str) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with grpc.insecure_channel(running.target) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
        metadata = (("api-key", "user"),)
        (found,) = stub.ServerReflectionInfo(iter([question]), metadata=metadata, timeout=PATIENCE)
        assert found.WhichOneof("message_response") == answer


def test_the_client_needs_no_jax() -> None:
    code = (
        "import serving.client, sys; "
        "print([m for m in ('jax', 'mixtral_jax', 'fastapi') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
