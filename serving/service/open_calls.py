"""Open calls: their number is bounded for each caller, and their request must come soon.

A call of a gateway counts as one of the caller for whom the gateway asks: without that a caller's
prompts that wait to be tokenized would take every call that the server has.

gRPC counts a call as soon as its head has come. Whoever sent heads without requests would fill the
server's number of calls, so that here a handler begins with the head, and waits for its request.

A request that has come in part is kept by gRPC, megabytes of it. So a few requests of a caller come
at the same time, and gRPC leaves the others in the network, which it does while nobody reads them.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc

from serving.errors import DeadlineExceeded, InvalidRequest, Overloaded, ServingError
from serving.proto import inference_pb2 as pb
from serving.service.message_size import counting
from serving.service.refusal import abort

REQUEST_SECONDS = 30.0
"""Seconds from the head of a call to the end of its request."""
MAX_READING = 4
"""Requests of a caller that are read at the same time, and its calls that go on with more."""


class OpenCalls:
    """Counts the calls that are open.

    Args:
        max_calls: Calls that one caller may have open.
        request_seconds: Time in which a call's request must have come.
    """

    def __init__(self, max_calls: int, request_seconds: float = REQUEST_SECONDS) -> None:
        self._max_calls = max_calls
        self._request_seconds = request_seconds
        self._open: Counter[str] = Counter()  # by caller
        self._reading: dict[str, asyncio.Semaphore] = {}  # of callers with open calls
        self._going_on: Counter[str] = Counter()  # calls with several requests, by caller

    def bounded(self, handler: Any, caller: str | None) -> Any:
        """Returns a method's handler with these bounds.

        Args:
            handler: That of the method, or of its refusal.
            caller: The caller's name; None for a stranger, who is refused at once, and for a
                gateway, whose requests name their callers.
        """

        if caller is None and handler.request_streaming:
            return handler  # a refusal, which reads nothing

        async def whole(requests: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                with self._counted(caller):
                    request = await self._request(handler, requests, caller)
                    answer = handler.stream_unary or handler.unary_unary
                    return await answer(request, context)
            except ServingError as error:
                await abort(context, error)

        async def stream(requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            try:
                with self._counted(caller):
                    request = await self._request(handler, requests, caller)
                    answer = handler.stream_stream or handler.unary_stream
                    with self._counted(_caller_of(request) if caller is None else None):
                        async with aclosing(answer(request, context)) as items:
                            async for item in items:
                                yield item
            except ServingError as error:
                await abort(context, error)

        parse = handler.request_deserializer and counting(handler.request_deserializer)
        # Handlers that take a stream of requests begin before the first of them has come.
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(stream, parse, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(whole, parse, handler.response_serializer)

    @contextmanager
    def _counted(self, caller: str | None) -> Iterator[None]:
        if caller is None:
            yield
            return
        if self._open[caller] >= self._max_calls:
            raise Overloaded(f"{self._max_calls} calls of yours are open already; end some first")
        try:
            with counted(self._open, caller):
                yield
        finally:
            if not self._open[caller]:
                self._reading.pop(caller, None)

    async def _request(self, handler: Any, requests: Any, caller: str | None) -> Any:
        if caller is not None:
            requests = self._in_turn(requests, caller)
        if handler.request_streaming:  # it may refuse the call before it reads one
            return _timely(requests, self._request_seconds)
        # Else it keeps its request until the collector comes to it.
        async with aclosing(aiter(requests)) as requests:
            return await first_request(requests, self._request_seconds)

    async def _in_turn(self, requests: Any, caller: str) -> AsyncIterator[Any]:
        """Yields a call's requests; raises Overloaded if too many calls go on behind the first."""
        async with self._reading.setdefault(caller, asyncio.Semaphore(MAX_READING)):
            first = await anext(aiter(requests), None)
        if first is None:
            return
        yield first
        if self._going_on[caller] >= MAX_READING:
            raise Overloaded(f"{MAX_READING} calls of yours send requests already; end some first")
        with counted(self._going_on, caller):
            async for request in requests:
                yield request


def _caller_of(request: Any) -> str | None:
    """Returns the caller whom a gateway's request names, if it names one."""
    return request.caller or None if isinstance(request, pb.GenerateRequest) else None


async def _timely(requests: Any, seconds: float) -> AsyncIterator[Any]:
    """Yields a call's requests; raises DeadlineExceeded if the first has not come in time."""
    first = await _first(requests, seconds)
    if first is not None:
        yield first
        async for request in requests:
            yield request


@contextmanager
def counted(counts: "Counter[str]", name: str) -> Iterator[None]:
    """Counts a name during the block."""
    counts[name] += 1
    try:
        yield
    finally:
        counts[name] -= 1
        if not counts[name]:
            del counts[name]


async def first_request(requests: Any, seconds: float) -> Any:
    """Returns the first of a call's requests.

    Raises:
        DeadlineExceeded: It has not come within `seconds`.
        InvalidRequest: There is none, or it has too many fields.
    """
    first = await _first(requests, seconds)
    if first is None:
        raise InvalidRequest("the call has no request")
    return first


async def _first(requests: Any, seconds: float) -> Any:
    """Returns the first of a call's requests, None if there is none; raises DeadlineExceeded."""
    # No task of its own: what it raised and this frame would refer to each other, and keep the
    # megabytes of a refused message until the collector comes to them.
    try:
        async with asyncio.timeout(seconds):
            return await anext(aiter(requests), None)
    except TimeoutError:
        raise DeadlineExceeded(f"no request has come within {seconds:g} seconds") from None


def host_of(context: grpc.aio.ServicerContext) -> str:
    """Returns the address of a call's sender without its port."""
    return (context.peer() or "").rpartition(":")[0]
