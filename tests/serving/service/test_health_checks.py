"""Health checks need no key, and their number and size have bounds."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from serving.service.health_checks import MAX_CALLS_OF_ADDRESS, HealthCalls

SERVING = health_pb2.HealthCheckResponse.SERVING


class Bounding(grpc.aio.ServerInterceptor):
    """Puts the bounds around every method."""

    def __init__(self, calls: HealthCalls) -> None:
        self._calls = calls

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        return self._calls.bounded(await continuation(handler_call_details))


@asynccontextmanager
async def checked(
    seconds: float = 30.0,
) -> AsyncIterator[tuple[HealthCalls, grpc.aio.Channel, health_pb2_grpc.HealthStub]]:
    calls = HealthCalls(seconds)
    server = grpc.aio.server(interceptors=[Bounding(calls)])
    servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield calls, channel, health_pb2_grpc.HealthStub(channel)
    await server.stop(0)


def test_an_address_has_so_many_watches_and_no_more() -> None:
    async def run() -> None:
        async with checked() as (calls, _, stub):
            request = health_pb2.HealthCheckRequest()
            assert (await stub.Check(request)).status == SERVING
            watches = [stub.Watch(request) for _ in range(MAX_CALLS_OF_ADDRESS)]
            for watch in watches:
                assert (await watch.read()).status == SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Watch(request).read()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            for watch in watches:
                watch.cancel()
            while calls._open:
                await asyncio.sleep(0.01)
            assert (await stub.Watch(request).read()).status == SERVING

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_long_name_is_refused() -> None:
    async def run() -> None:
        async with checked() as (_, _, stub):
            request = health_pb2.HealthCheckRequest(service="a" * 201)
            for call in (stub.Check(request), stub.Watch(request).read()):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(run())


def test_a_head_without_a_request_ends() -> None:
    async def run() -> None:
        async with checked(0.05) as (calls, channel, _):
            call = channel.stream_unary("/grpc.health.v1.Health/Check")()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            while calls._open:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 30))
