"""Calls that are open: so many of a caller, and none without a request."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from serving.errors import ERROR_METADATA
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from serving.service.open_calls import MAX_READING, OpenCalls
from tests.support.fakes import KEY, ScriptedInference


class Echo(grpc.aio.ServerInterceptor):
    """Answers every method with its request, once `gate` is set, within the bounds."""

    def __init__(self, calls: OpenCalls) -> None:
        self.gate = asyncio.Event()
        self._calls = calls

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        async def whole(request: bytes, context: object) -> bytes:
            await self.gate.wait()
            return request

        async def stream(request: bytes, context: object) -> AsyncIterator[bytes]:
            await self.gate.wait()
            yield request

        caller = dict(handler_call_details.invocation_metadata).get("caller")

        async def streams(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
            async for request in requests:
                yield request

        handler: Any = grpc.unary_unary_rpc_method_handler(whole)
        if handler_call_details.method == "/a/streams":
            handler = grpc.stream_stream_rpc_method_handler(streams)
        if handler_call_details.method == "/a/stream":
            handler = grpc.unary_stream_rpc_method_handler(stream)
        return self._calls.bounded(handler, caller)


@asynccontextmanager
async def echoing(most: int, seconds: float) -> AsyncIterator[tuple[Echo, grpc.aio.Channel]]:
    echo = Echo(OpenCalls(most, seconds))
    server = grpc.aio.server(interceptors=[echo])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield echo, channel
    await server.stop(0)


def test_a_caller_has_so_many_calls_and_others_have_theirs() -> None:
    async def run() -> None:
        async with echoing(2, 30.0) as (echo, channel):
            ask, stream = channel.unary_unary("/a/whole"), channel.unary_stream("/a/stream")
            alice, bob = (("caller", "alice"),), (("caller", "bob"),)
            held: list[Any] = [ask(b"1", metadata=alice), stream(b"2", metadata=alice)]
            while echo._calls._open["alice"] < 2:
                await asyncio.sleep(0.01)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(b"3", metadata=alice)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert dict(caught.value.trailing_metadata())[ERROR_METADATA] == "Overloaded"
            gateway, other = ask(b"4"), ask(b"5", metadata=bob)  # None is bounded by itself
            echo.gate.set()
            assert [await held[0], await gateway, await other] == [b"1", b"4", b"5"]
            assert [item async for item in held[1]] == [b"2"]
            assert await ask(b"6", metadata=alice) == b"6"
            while echo._calls._open:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 30))


class Gateways(grpc.aio.ServerInterceptor):
    """Takes every call for a gateway's."""

    def __init__(self, calls: OpenCalls) -> None:
        self._calls = calls

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        return self._calls.bounded(await continuation(handler_call_details), None)


def test_calls_of_a_gateway_count_as_its_callers() -> None:
    """Two prompts of alice wait; her third is refused, and bob's is answered."""

    def ask(stub: rpc.InferenceStub, caller: str, text: str = "!wait") -> Any:
        key = (("authorization", f"Bearer {KEY}"),)
        return stub.Generate(pb.GenerateRequest(text=text, caller=caller), metadata=key)

    async def run() -> None:
        calls, service = OpenCalls(2), ScriptedInference()
        server = grpc.aio.server(interceptors=[Gateways(calls)])
        rpc.add_InferenceServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = rpc.InferenceStub(channel)
            held = [ask(stub, "alice") for _ in range(2)]
            while calls._open["alice"] < 2:
                await asyncio.sleep(0.01)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(stub, "alice").read()
            assert dict(caught.value.trailing_metadata())[ERROR_METADATA] == "Overloaded"
            assert [chunk async for chunk in ask(stub, "bob", "one")]
            for call in held:
                call.cancel()
            while calls._open:
                await asyncio.sleep(0.01)
        await server.stop(0)

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize("method", ["/a/whole", "/a/stream", "/a/streams"])
def test_a_head_without_a_request_ends(method: str) -> None:
    async def run() -> None:
        async with echoing(1, 0.05) as (echo, channel):
            call = channel.stream_stream(method)(metadata=(("caller", "alice"),))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            while echo._calls._open:
                await asyncio.sleep(0.01)
        async with echoing(1, 30.0) as (echo, channel):
            call = channel.stream_stream(method)(metadata=(("caller", "alice"),))
            await call.done_writing()
            if method == "/a/streams":
                assert await call.read() is grpc.aio.EOF
            else:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            while echo._calls._open:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_stream_of_requests_comes_whole() -> None:
    async def run() -> None:
        async with echoing(1, 30.0) as (_, channel):
            call = channel.stream_stream("/a/streams")(metadata=(("caller", "alice"),))
            for number in range(3):
                await call.write(b"%d" % number)
                assert await call.read() == b"%d" % number
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF

    asyncio.run(asyncio.wait_for(run(), 30))


class Slow:
    """The requests of a call, of which the next comes when `gate` is set."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.is_read = False

    def __aiter__(self) -> "Slow":
        return self

    async def __anext__(self) -> bytes:
        self.is_read = True
        await self.gate.wait()
        return b"request"


def test_a_few_requests_of_a_caller_are_read_at_the_same_time() -> None:
    async def run() -> None:
        calls = OpenCalls(100)
        mine = [Slow() for _ in range(MAX_READING + 2)]
        tasks = [asyncio.create_task(anext(calls._in_turn(slow, "alice"))) for slow in mine]
        other = Slow()
        tasks.append(asyncio.create_task(anext(calls._in_turn(other, "bob"))))
        await asyncio.sleep(0.01)
        assert [slow.is_read for slow in mine] == [True] * MAX_READING + [False] * 2
        assert other.is_read
        tasks[0].cancel()  # a call that has ended makes room for the next
        mine[1].gate.set()
        await asyncio.sleep(0.01)
        assert all(slow.is_read for slow in mine)
        assert await tasks[1] == b"request"
        for task in tasks:
            task.cancel()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_few_calls_of_a_caller_go_on_behind_their_first_request() -> None:
    """Another one is refused, and takes the place of one that has ended."""

    async def run() -> None:
        async with echoing(100, 30.0) as (echo, channel):
            echo.gate.set()
            streams = channel.stream_stream("/a/streams")
            metadata = (("caller", "alice"),)
            begun: list[Any] = []
            for _ in range(MAX_READING):
                begun.append(streams(metadata=metadata))
                for request in (b"1", b"2"):
                    await begun[-1].write(request)
                    assert await begun[-1].read() == request
            extra = streams(metadata=metadata)
            await extra.write(b"1")
            assert await extra.read() == b"1"
            with pytest.raises(grpc.aio.AioRpcError, match="send requests already"):
                await extra.read()
            begun[0].cancel()
            while echo._calls._going_on["alice"] == MAX_READING:
                await asyncio.sleep(0.01)
            again = streams(metadata=metadata)
            for request in (b"1", b"2"):
                await again.write(request)
                assert await again.read() == request

    asyncio.run(asyncio.wait_for(run(), 30))
