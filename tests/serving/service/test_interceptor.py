"""The interceptor before a service that notes what it is asked: who asks, and who may say so."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.accounting.accounts import Accounts
from serving.accounting.admission import Admission
from serving.accounting.caller_fields import CallerFields
from serving.errors import ERROR_METADATA
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from serving.service.direct_calls import DirectCalls
from serving.service.interceptor import AccessInterceptor

KEYS = {"default": "operator's", "gateway": "gateway's"}
FIELDS = CallerFields("gateway's")


class Noting(rpc.InferenceServicer):
    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []

    async def Generate(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateChunk]:
        self.requests.append(request)
        yield pb.GenerateChunk(prompt_tokens=3)
        yield pb.GenerateChunk(text="x", token_ids=[1], finish_reason=pb.FINISH_REASON_STOP)


def served(
    work: Callable[[rpc.InferenceStub, Noting], Awaitable[None]], admission: Admission | None = None
) -> None:
    async def run() -> None:
        access = Access(Keyring(KEYS))
        calls = DirectCalls(admission or Admission(Accounts()), FIELDS, 512)
        server = grpc.aio.server(interceptors=[AccessInterceptor(access, direct_calls=calls)])
        service = Noting()
        rpc.add_InferenceServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await work(rpc.InferenceStub(channel), service)
        await server.stop(0)

    asyncio.run(run())


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
