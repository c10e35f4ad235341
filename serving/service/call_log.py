"""The log of calls: a line for each gRPC call when it is over, refused ones included.

A line has the method, caller, status, seconds, tokens and the caller's address, and never a text of
a request or an answer. Health checks come several times a second and are not logged.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health

from serving.access.caller import GATEWAY
from serving.errors import ERROR_METADATA
from serving.observe.logs import fields
from serving.proto import inference_pb2 as pb
from serving.service.bounds import MAX_CALLER_BYTES
from serving.service.health_checks import HealthCalls
from serving.service.open_calls import OpenCalls

LOGGER = "serving.service.call_log"
_STATUS_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}

logger = logging.getLogger(LOGGER)


@dataclass
class CallLine:
    """The figures of one call that its line in the log has."""

    method: str
    metadata: Sequence[tuple[str, str | bytes]] = ()
    caller: str | None = None
    """Name of the caller; None if nobody was let in."""
    prompt_tokens: int | None = None
    completion_tokens: int = 0
    adapter: str | None = None
    """Name of the adapter that answers; None for the model itself."""
    started: float = field(default_factory=time.monotonic)

    def add(self, chunk: object) -> None:
        """Counts the tokens of a chunk of an answer; other messages have none."""
        if isinstance(chunk, pb.GenerateChunk):
            if chunk.HasField("prompt_tokens"):
                self.prompt_tokens = chunk.prompt_tokens
                self.adapter = chunk.adapter or None
            self.completion_tokens += len(chunk.token_ids)
            if chunk.HasField("usage"):
                self.completion_tokens = chunk.usage.completion_tokens

    def write(self, status: str, peer: str, error: str | None) -> None:
        """Writes the line.

        Args:
            status: Name of the gRPC status.
            peer: Address of the caller, as gRPC writes it.
            error: Name of the error of serving/errors.py, if it ended with one.
        """
        request_id = next((value for key, value in self.metadata if key == "x-request-id"), None)
        has_tokens = self.prompt_tokens is not None
        level = logging.WARNING if status in ("INTERNAL", "UNKNOWN") else logging.INFO
        line = fields(
            id=None if request_id is None else str(request_id)[:100],
            caller=self.caller,
            method=self.method,
            status=status,
            error=error,
            peer=peer,
            seconds=round(time.monotonic() - self.started, 4),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens if has_tokens else None,
            adapter=self.adapter,
        )
        logger.log(level, "call", extra=line)


@dataclass(frozen=True)
class LoggedDetails:
    """A call's details as the interceptor inside `CallLog` sees them, with the line to fill in."""

    method: str
    invocation_metadata: Sequence[tuple[str, str | bytes]]
    line: CallLine


class CallLog(grpc.aio.ServerInterceptor):
    """Logs every call, and holds calls to the bounds of those that are open.

    Args:
        interceptor: Decides on the calls, and may write the caller into `LoggedDetails.line`; what
            it refuses is logged too.
        open_calls: Bounds the calls of each caller.
        health_calls: Bounds the health checks.
    """

    def __init__(
        self,
        interceptor: grpc.aio.ServerInterceptor,
        open_calls: OpenCalls,
        health_calls: HealthCalls,
    ) -> None:
        self._interceptor = interceptor
        self._open_calls = open_calls
        self._health_calls = health_calls

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Returns the method's handler in one that logs; None where there is no such method."""
        method: str = handler_call_details.method
        metadata: Any = handler_call_details.invocation_metadata or ()
        line = CallLine(method, metadata)

        async def proceed(details: object) -> Any:
            return await continuation(handler_call_details)  # gRPC takes its own type alone

        details: Any = LoggedDetails(method, metadata, line)
        handler = await self._interceptor.intercept_service(proceed, details)
        if handler is None:
            return None
        if method.startswith(f"/{health.SERVICE_NAME}/"):
            return self._health_calls.bounded(handler)
        caller = None if line.caller == GATEWAY else line.caller
        return _logged(self._open_calls.bounded(handler, caller), line)


def _logged(handler: Any, line: CallLine) -> Any:
    """Returns a handler that writes the line when its call is over.

    Args:
        handler: One that takes a stream of requests.
        line: The line.
    """

    async def whole(requests: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            with _writing(line, context):
                async with aclosing(_noted(requests, line)) as noted:
                    return await handler.stream_unary(noted, context)
        except grpc.aio.AbortError as error:
            raise _without_frames(error) from None

    async def stream(requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            with _writing(line, context):
                async with (
                    aclosing(_noted(requests, line)) as noted,
                    aclosing(handler.stream_stream(noted, context)) as items,
                ):
                    async for item in items:
                        line.add(item)
                        yield item
        except grpc.aio.AbortError as error:
            raise _without_frames(error) from None

    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(
            stream, handler.request_deserializer, handler.response_serializer
        )
    return grpc.stream_unary_rpc_method_handler(
        whole, handler.request_deserializer, handler.response_serializer
    )


def _without_frames(error: grpc.aio.AbortError) -> grpc.aio.AbortError:
    """Returns the error without the frames that it came through, and without its cause.

    A call refers to the error that ended it, and the frames refer to the call and to its request:
    a circle, which would keep a refused request's megabytes until the collector comes to it.
    """
    error.__context__ = None
    return error.with_traceback(None)


async def _noted(requests: Any, line: CallLine) -> AsyncGenerator[Any, None]:
    """Passes requests on; from one of a gateway the line has its caller.

    It closes what it reads from, which else would keep its last request until the collector comes.
    """
    async with aclosing(aiter(requests)) as messages:
        async for request in messages:
            if isinstance(request, pb.GenerateRequest) and line.caller == GATEWAY:
                line.caller = request.caller[:MAX_CALLER_BYTES] or GATEWAY
            yield request


@contextmanager
def _writing(line: CallLine, context: grpc.aio.ServicerContext) -> Iterator[None]:
    """Writes the line when the block ends, whatever its end is."""
    status = None
    peer = context.peer() or ""  # not at the end: gRPC may have freed the call by then
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        status = "CANCELLED"
        raise
    except BaseException:
        status = _status_of(context) if _status_of(context) != "OK" else "UNKNOWN"
        raise
    finally:
        trailing: Any = context.trailing_metadata() or ()
        error = next((str(value) for key, value in trailing if key == ERROR_METADATA), None)
        line.write(status or _status_of(context), peer, error)


def _status_of(context: grpc.aio.ServicerContext) -> str:
    code: Any = context.code()  # a number, or the StatusCode that a handler has set
    return code.name if isinstance(code, grpc.StatusCode) else _STATUS_NAMES.get(code, "OK")
