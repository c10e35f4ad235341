"""Health checks need no key, and their number and size have bounds."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.service.health_checks import _MAX_WATCHES_OF_ADDRESS, HealthChecks

SERVING = health_pb2.HealthCheckResponse.SERVING


@asynccontextmanager
async def checked() -> AsyncIterator[tuple[HealthChecks, health_pb2_grpc.HealthStub]]:
    server, checks = grpc.aio.server(), HealthChecks()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield checks, health_pb2_grpc.HealthStub(channel)
    await server.stop(0)


def test_an_address_has_so_many_watches_and_no_more() -> None:
    async def run() -> None:
        async with checked() as (checks, stub):
            request = health_pb2.HealthCheckRequest()
            watches = [stub.Watch(request) for _ in range(_MAX_WATCHES_OF_ADDRESS)]
            for watch in watches:
                assert (await watch.read()).status == SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Watch(request).read()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert (await stub.Check(request)).status == SERVING
            for watch in watches:
                watch.cancel()
            while checks._watches:
                await asyncio.sleep(0.01)
            assert (await stub.Watch(request).read()).status == SERVING

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_long_name_is_refused() -> None:
    async def run() -> None:
        async with checked() as (checks, stub):
            request = health_pb2.HealthCheckRequest(service="a" * 201)
            for call in (stub.Check(request), stub.Watch(request).read()):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert not checks._server_watchers

    asyncio.run(run())
