"""One answer of the model service under way, and the errors that its calls end with."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc

from serving.accounting.answer_tokens import AnswerTokens
from serving.errors import (
    ERROR_METADATA,
    WEAKENED_METADATA,
    EngineFailure,
    Forbidden,
    ServingError,
    Unavailable,
    from_grpc,
)
from serving.gateway.aboard import Sent
from serving.proto import inference_pb2

# Chunks that are kept of an answer whose reader is slow. More of them wait in the service.
READ_AHEAD = 64

# Statuses without a name of ours: gRPC has found no willing model service for the moment.
_UNREACHABLE = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
}

# Statuses without a name of ours that a broken connection has.
_BROKEN = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}

logger = logging.getLogger(__name__)


class Answer:
    """A running Generate call, read by a task of its own up to READ_AHEAD chunks ahead.

    Args:
        call: The call of gRPC's stub.
        sent: Is told how the call ends.
        tokens: Counts the answer; by default new ones.
        is_connected: Whether the call was begun on a connection to a service.
        on_gone: Called if the service has gone away.

    Attributes:
        tokens: The counts of the call.
        weakened: The parts of the caller's schemas that are not enforced, as the metadata
            `mixtral-weakened` lists them; known with the first chunk.
    """

    def __init__(
        self,
        call: Any,
        sent: Sent | None = None,
        tokens: AnswerTokens | None = None,
        *,
        is_connected: bool = False,
        on_gone: Callable[[], None] = lambda: None,
    ) -> None:
        self.tokens = (tokens or AnswerTokens(),)
        self.weakened = ""
        self._call = call
        self._sent = sent
        self._is_aboard = is_connected
        self._on_gone = on_gone
        self._arrived: deque[inference_pb2.GenerateChunk] = deque()
        self._has_ended = False
        self._failure: ServingError | None = None  # that ended it
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None  # of the reader that waits for news
        # One timer serves many waits: to set and cancel one for each token would cost more than
        # the wait itself.
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = 0.0  # of the present wait
        self._room = asyncio.Event()
        # Cancelling gRPC's read cancels the call, so that no wait with a timeout may contain it.
        self._reading = asyncio.create_task(self._read_ahead())

    @property
    def has_begun(self) -> bool:
        """True when the prompt has been rendered and queued."""
        (tokens,) = self.tokens
        return bool(tokens.prompt_tokens or tokens.completion_tokens)

    async def has_news(self, seconds: float | None = None) -> bool:
        """Waits until a read will return at once; returns False if `seconds` pass before.

        One task waits at a time.
        """
        if not (self._arrived or self._has_ended):
            self._waiter = self._loop.create_future()
            if seconds is not None:
                self._deadline = self._loop.time() + seconds
                self._set_timer()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return bool(self._arrived) or self._has_ended

    def _set_timer(self) -> None:
        if self._timer is not None and self._timer.when() > self._deadline:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._pass_time)

    def _pass_time(self) -> None:
        """Ends the wait if its time is over; else goes on, because a later wait has begun."""
        self._timer = None
        if self._waiter is None:
            return
        if self._loop.time() < self._deadline:
            self._set_timer()
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def read(self) -> inference_pb2.GenerateChunk | None:
        """Returns the next chunk, None after the last; raises the ServingError that ended it."""
        await self.has_news()
        if self._arrived:
            self._room.set()
            return self._arrived.popleft()
        if self._failure is not None:
            raise self._failure
        return None

    async def read_all(self) -> list[inference_pb2.GenerateChunk]:
        """Returns the chunks that have arrived, at least one; [] after the last one.

        Raises:
            ServingError: The error that ended the call.
        """
        first = await self.read()
        if first is None:
            return []
        chunks = [first, *self._arrived]
        self._arrived.clear()
        return chunks

    def cancel(self) -> None:
        """Frees everything that the answer holds in the service. May be called again."""
        if self._sent is not None:
            self._sent.end(is_whole=False)
        self._reading.cancel()
        self._call.cancel()

    async def _read_ahead(self) -> None:
        is_whole = False
        try:
            while isinstance(chunk := await self._call.read(), inference_pb2.GenerateChunk):
                if chunk.HasField("prompt_tokens"):
                    self.weakened = _weakened_in(await self._call.initial_metadata())
                self._is_aboard = True
                self.tokens[0].add(chunk)
                is_whole = chunk.HasField("usage")  # only the last chunk of all choices has it
                self._arrived.append(chunk)
                self._wake()
                while len(self._arrived) >= READ_AHEAD:
                    self._room.clear()
                    await self._room.wait()
            if not is_whole:
                self._failure = EngineFailure(
                    "the model service ended its answer without a reason to finish"
                )
        except grpc.aio.AioRpcError as failure:
            if self._sent is not None and self._is_aboard and _is_death(failure):
                self._sent.die()
            if is_gone(failure):
                self._on_gone()
            self._failure = error_of(failure)
            self._failure.__cause__ = failure
        except asyncio.CancelledError:  # by `cancel`, or as the channel was closed
            self._failure = Unavailable("the answer was given up; try again shortly")
            raise
        except Exception:  # a bug of ours, or a service of another version
            logger.exception("an answer of the model service could not be read")
            self._failure = EngineFailure("the model service's answer could not be read")
            self._call.cancel()
        finally:
            if self._sent is not None:
                self._sent.end(is_whole=is_whole)
            self._has_ended = True
            if self._timer is not None:
                self._timer.cancel()
            self._wake()


def _weakened_in(metadata: Any) -> str:
    """Returns what initial metadata says of the parts of a schema that are not enforced."""
    return next((str(value) for key, value in metadata or () if key == WEAKENED_METADATA), "")


def is_gone(failure: grpc.aio.AioRpcError) -> bool:
    """Returns whether a call failed because no service is there."""
    return failure.code() is grpc.StatusCode.UNAVAILABLE


def _is_death(failure: grpc.aio.AioRpcError) -> bool:
    """Returns whether a call under way may have failed because the service died."""
    name = _name_of(failure)
    if name is None:
        return failure.code() in _BROKEN
    return name == Unavailable.__name__  # as a group says it that has lost a process


def _name_of(failure: grpc.aio.AioRpcError) -> str | None:
    """Returns the name of the error of serving/errors.py that the service gave, if it did."""
    trailing: Any = failure.trailing_metadata() or ()  # pairs, which the stubs do not know
    return next((str(value) for key, value in trailing if key == ERROR_METADATA), None)


def error_of(failure: grpc.aio.AioRpcError) -> ServingError:
    """Returns the error that a failed call is for clients; the operator's log has the rest."""
    code, name = failure.code(), _name_of(failure)
    if code == grpc.StatusCode.UNAUTHENTICATED:
        # The client's key was right, or the request would not have come so far.
        logger.error("the model service refuses the gateway's key: give both the same one")
        return Unavailable("the model service is not available to this gateway")
    if name == Forbidden.__name__:
        logger.error(
            "the model service does not take this gateway's key for a gateway's: set its "
            "MIXTRAL_JAX_SERVICE_KEY to the same as here (%s)",
            failure.details(),
        )
        return Unavailable("the model service is not available to this gateway")
    if name is not None:
        trailing: Any = failure.trailing_metadata()
        return from_grpc(code.name, failure.details() or "", trailing)
    logger.warning("call of the model service failed: %s: %s", code.name, failure.details())
    if code in _UNREACHABLE:
        return Unavailable("the model service cannot be reached; try again shortly")
    return from_grpc(code.name, "the model service failed; its log says why")
