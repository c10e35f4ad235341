"""The interceptor before a service that notes what it is asked: who asks, and who may say so."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from serving.access.caller import Caller, CallerLimits
from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.accounting.accounts import Accounts
from serving.accounting.admission import Admission
from serving.accounting.caller_fields import CallerFields
from serving.accounting.ledger import UsageLedger
from serving.accounting.rate_limits import RateLimits
from serving.client import Client
from serving.errors import (
    ERROR_METADATA,
    EngineFailure,
    InvalidRequest,
    Overloaded,
    ServingError,
    from_grpc,
)
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from serving.service.direct_calls import DirectCalls, turn_of
from serving.service.interceptor import AccessInterceptor
from serving.service.refusal import abort

KEYS = {"default": "operator's", "gateway": "gateway's"}
FIELDS = CallerFields("gateway's")


class Noting(rpc.InferenceServicer):
    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.turns: list[str] = []

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateChunk]:
        self.requests.append(request)
        yield pb.GenerateChunk(prompt_tokens=3)
        if request.text == "wait":
            yield pb.GenerateChunk(computed_tokens=2)
            await asyncio.Event().wait()
        if request.text == "fail":
            yield pb.GenerateChunk(computed_tokens=2)
            await abort(context, EngineFailure("broken"))
        yield pb.GenerateChunk(text="x", token_ids=[1], finish_reason=pb.FINISH_REASON_STOP)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.Tokens:
        self.turns.append(turn_of(context))
        return pb.Tokens(ids=[1])


@asynccontextmanager
async def serving(admission: Admission | None = None) -> AsyncIterator[tuple[str, Noting]]:
    access = Access(Keyring(KEYS))
    calls = DirectCalls(admission or Admission(Accounts()), FIELDS, 512)
    server = grpc.aio.server(interceptors=[AccessInterceptor(access, direct_calls=calls)])
    service = Noting()
    rpc.add_InferenceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}", service
    await server.stop(0)


def served(
    work: Callable[[rpc.InferenceStub, Noting], Awaitable[None]], admission: Admission | None = None
) -> None:
    async def run() -> None:
        async with (
            serving(admission) as (target, service),
            grpc.aio.insecure_channel(target) as channel,
        ):
            await work(rpc.InferenceStub(channel), service)

    asyncio.run(run())


class Books:
    """An admission, and what it has written down."""

    def __init__(self, **limits: int) -> None:
        self.rates = RateLimits(CallerLimits(**limits), clock=lambda: 1000.0)
        self.accounts = Accounts(self.rates, UsageLedger())
        self.admission = Admission(self.accounts, assumed_max_tokens=10)

    async def written(self) -> list[tuple[str, int, int, int]]:
        rows = await self.accounts.report(None)
        return [
            (row.caller, row.requests, row.prompt_tokens, row.completion_tokens) for row in rows
        ]


async def refusal(call: Any) -> ServingError:
    """The error that a call ends with, as the clients of this repository read it."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    trailing: Any = caught.value.trailing_metadata()
    return from_grpc(caught.value.code().name, str(caught.value.details()), trailing)


def bearer(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {KEYS[name]}"),)


def test_a_direct_caller_is_the_one_whose_key_it_is() -> None:
    async def work(stub: rpc.InferenceStub, service: Noting) -> None:
        asked = pb.GenerateRequest(text="one")
        chunks = [chunk async for chunk in stub.Generate(asked, metadata=bearer("default"))]
        assert [chunk.text for chunk in chunks] == ["", "x"]
        (request,) = service.requests
        assert (request.text, request.caller) == ("one", "default")
        assert request.cache_salt == FIELDS.salt("default")
        assert not request.suspect

    served(work)


def test_the_gateway_says_who_asks() -> None:
    async def work(stub: rpc.InferenceStub, service: Noting) -> None:
        asked = pb.GenerateRequest(
            caller="me", cache_salt=b"x", priority=pb.PRIORITY_BATCH, suspect=True
        )
        async for _ in stub.Generate(asked, metadata=bearer("gateway")):
            pass
        assert service.requests == [asked]

    served(work)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("caller", "me"),
        ("cache_salt", b"x"),
        ("priority", pb.PRIORITY_INTERACTIVE),
        ("suspect", True),
    ],
)
def test_from_any_other_key_that_is_permission_denied(name: str, value: Any) -> None:
    async def work(stub: rpc.InferenceStub, service: Noting) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            asked = pb.GenerateRequest(**{name: value})
            async for _ in stub.Generate(asked, metadata=bearer("default")):
                pass
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert name in str(caught.value.details())
        trailing: Any = caught.value.trailing_metadata()
        assert dict(trailing)[ERROR_METADATA] == "Forbidden"
        assert service.requests == []

    served(work)


def test_direct_calls_are_limited_and_written_down_and_the_gateways_are_not() -> None:
    books = Books(requests_per_minute=2)

    async def work(stub: rpc.InferenceStub, service: Noting) -> None:
        asked = pb.GenerateRequest(text="one")
        for _ in range(5):
            async for _ in stub.Generate(asked, metadata=bearer("gateway")):
                pass
        for _ in range(2):
            async for _ in stub.Generate(asked, metadata=bearer("default")):
                pass
        error = await refusal(stub.Generate(asked, metadata=bearer("default")))
        assert isinstance(error, Overloaded) and error.retry_after_ms == 30_000
        assert "2 requests a minute" in str(error)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Tokenize(pb.TokenizeRequest(text="x"), metadata=bearer("default"))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(service.requests) == 7
        assert await books.written() == [("default", 2, 6, 2)]

    served(work, books.admission)
    books.accounts.close()


def test_a_direct_call_beyond_its_limit_is_refused_before_its_request_comes() -> None:
    books = Books(concurrent_requests=1)

    async def run() -> None:
        async with (
            serving(books.admission) as (target, _),
            grpc.aio.insecure_channel(target) as channel,
        ):
            waiting = rpc.InferenceStub(channel).Generate(
                pb.GenerateRequest(text="wait"), metadata=bearer("default")
            )
            await waiting.read()
            # On the wire a call of one request is a stream of requests, of which none is sent here.
            open_call = channel.stream_stream("/mixtral.v1.Inference/Generate")
            call = open_call(metadata=bearer("default"))
            assert await asyncio.wait_for(call.code(), 10) is grpc.StatusCode.RESOURCE_EXHAUSTED
            waiting.cancel()

    asyncio.run(run())
    books.accounts.close()


def test_the_python_client_reads_how_long_to_wait() -> None:
    books = Books(requests_per_minute=1)

    def ask(target: str) -> list[float | None]:
        waits: list[float | None] = []
        with Client(target, key=KEYS["default"]) as client:
            for _ in range(2):
                try:
                    list(client.generate("one"))
                    waits.append(None)
                except Overloaded as error:
                    waits.append(error.retry_after)
        return waits

    async def run() -> None:
        async with serving(books.admission) as (target, _):
            assert await asyncio.to_thread(ask, target) == [None, 60]

    asyncio.run(run())
    books.accounts.close()


def test_nobody_pays_for_a_direct_call_that_the_server_has_lost() -> None:
    books = Books()

    async def work(stub: rpc.InferenceStub, service: Noting) -> None:
        asked = pb.GenerateRequest(text="fail")
        error = await refusal(stub.Generate(asked, metadata=bearer("default")))
        assert isinstance(error, EngineFailure)
        assert await books.written() == []
        async with asyncio.timeout(10):  # the caller has its answer first
            while books.rates._running:
                await asyncio.sleep(0.01)

    served(work, books.admission)
    books.accounts.close()


def test_tokens_of_direct_calls_are_reserved() -> None:
    books = Books(tokens_per_minute=30)

    async def work(stub: rpc.InferenceStub, service: Noting) -> None:
        def ask(**fields: Any) -> Any:
            return stub.Generate(pb.GenerateRequest(**fields), metadata=bearer("default"))

        error = await refusal(ask(text="one", max_tokens=31))
        assert type(error) is InvalidRequest and "30 tokens a minute" in str(error)
        error = await refusal(ask(text="one", max_tokens=5, n=7))
        assert type(error) is InvalidRequest
        first = ask(text="wait", max_tokens=20)
        assert (await first.read()).prompt_tokens == 3
        assert books.rates.allowances(Caller("default"))["tokens"].remaining == 30 - 23
        assert isinstance(await refusal(ask(text="one", max_tokens=9)), Overloaded)
        assert (await first.read()).computed_tokens == 2
        first.cancel()
        while not (written := await books.written()):
            await asyncio.sleep(0.01)
        assert written == [("default", 1, 2, 0)]  # what was computed before it was dropped
        assert books.rates.allowances(Caller("default"))["tokens"].remaining == 30 - 2
        assert books.rates._running == {}

    served(work, books.admission)
    books.accounts.close()


def test_calls_without_an_answer_take_turns_by_their_caller() -> None:
    """All of one machine have one address, and those that tokenize much are one of them."""

    async def work(stub: rpc.InferenceStub, service: Noting) -> None:
        for name in ("default", "gateway", "default"):
            await stub.Tokenize(pb.TokenizeRequest(text="x"), metadata=bearer(name))
        first, gateway, last = service.turns
        assert first == last == "caller default"
        assert gateway.startswith("address ipv4:127.0.0.1")

    served(work)
