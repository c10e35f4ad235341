"""The model service as the gateway sees it: one gRPC channel, and nothing else is shared with it.

Behind the channel there may be any number of replicas (serving/channel.py).

A failed call becomes an error of serving/errors.py. What the service said on purpose (it then names
the error in `mixtral-error`) is passed on; what gRPC says about addresses and sockets is for the
operator's log and never reaches a client.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.accounting.answer_tokens import Tally
from serving.errors import ERROR_METADATA, EngineFailure, ServingError, Unavailable, from_grpc
from serving.proto import inference_pb2, inference_pb2_grpc

# Seconds for calls that the service answers from memory.
SHORT_CALL_SECONDS = 3.0
# Chunks that are kept of an answer whose reader is slow. More of them wait in the service.
READ_AHEAD = 64

# Said by gRPC itself, these mean that no willing model service is there, for the moment.
_NOT_THERE = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.PERMISSION_DENIED,
}

logger = logging.getLogger(__name__)


class ModelService:
    """The calls that the gateway makes, each with the gateway's key. Lives as long as `channel`."""

    def __init__(self, channel: grpc.aio.Channel, key: str) -> None:
        self._inference = inference_pb2_grpc.InferenceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._model: inference_pb2.ModelInfo | None = None

    async def model(self) -> inference_pb2.ModelInfo:
        """Which model is served; asked once, then remembered."""
        if self._model is None:
            try:
                self._model = await self._inference.GetModelInfo(
                    inference_pb2.GetModelInfoRequest(),
                    metadata=self._metadata,
                    timeout=SHORT_CALL_SECONDS,
                )
            except grpc.aio.AioRpcError as failure:
                raise _error_of(failure) from failure
        return self._model

    async def check_ready(self) -> None:
        """Raises Unavailable unless the service says that it is serving."""
        try:
            answer = await self._health.Check(
                health_pb2.HealthCheckRequest(),
                metadata=self._metadata,
                timeout=SHORT_CALL_SECONDS,
            )
        except grpc.aio.AioRpcError as failure:
            raise Unavailable("the model service does not answer; try again shortly") from failure
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise Unavailable("the model service is not ready; try again shortly")

    def generate(
        self,
        request: inference_pb2.GenerateRequest,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> "Answer":
        """Starts an answer. The caller must `cancel()` it in the end, however it ends.

        `metadata` goes with the call beside the gateway's key, such as a request's id and trace.
        """
        return Answer(self._inference.Generate(request, metadata=(*self._metadata, *metadata)))


class Answer:
    """One running Generate call, read by a task of its own as fast as its reader takes it."""

    def __init__(self, call: Any) -> None:
        self.tally = Tally()
        self._call = call
        self._arrived: deque[inference_pb2.GenerateChunk] = deque()
        self._has_ended = False
        self._failure: ServingError | None = None  # that ended it
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        # Cancelling a read cancels the call, so that it must not be one of who waits with patience.
        self._reading = asyncio.create_task(self._read_ahead())

    async def has_news(self, patience: float | None = None) -> bool:
        """Waits until a read will return at once: True, or False after `patience` seconds."""
        if not (self._arrived or self._has_ended):
            self._news.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._news.wait()
        return bool(self._arrived) or self._has_ended

    async def read(self) -> inference_pb2.GenerateChunk | None:
        """The next chunk, None after the last one; raises the ServingError that ended the call."""
        await self.has_news()
        if self._arrived:
            self._room.set()
            return self._arrived.popleft()
        if self._failure is not None:
            raise self._failure
        return None

    async def read_all(self) -> list[inference_pb2.GenerateChunk]:
        """What has arrived, at least one chunk; [] after the last one; raises as `read`."""
        first = await self.read()
        if first is None:
            return []
        chunks = [first, *self._arrived]
        self._arrived.clear()
        return chunks

    def cancel(self) -> None:
        """Frees all that the answer holds in the service; nothing happens if it has ended."""
        self._reading.cancel()
        self._call.cancel()

    async def _read_ahead(self) -> None:
        is_whole = False
        try:
            while isinstance(chunk := await self._call.read(), inference_pb2.GenerateChunk):
                self.tally.add(chunk)
                is_whole = chunk.HasField("usage")  # so the last chunk of all choices is known
                self._arrived.append(chunk)
                self._news.set()
                while len(self._arrived) >= READ_AHEAD:
                    self._room.clear()
                    await self._room.wait()
            if not is_whole:
                self._failure = EngineFailure(
                    "the model service ended its answer without a reason to finish"
                )
        except grpc.aio.AioRpcError as failure:
            self._failure = _error_of(failure)
            self._failure.__cause__ = failure
        except asyncio.CancelledError:  # by `cancel`, or as the channel was closed
            self._failure = Unavailable("the answer was given up; try again shortly")
            raise
        finally:
            self._has_ended = True
            self._news.set()


def _error_of(failure: grpc.aio.AioRpcError) -> ServingError:
    code = failure.code()
    trailing: Any = failure.trailing_metadata() or ()  # pairs, which the stubs do not know
    name = next((str(value) for key, value in trailing if key == ERROR_METADATA), None)
    if code == grpc.StatusCode.UNAUTHENTICATED:
        # The client's key was right, or it would not have come so far: this is the operator's.
        logger.error("the model service refuses the gateway's key: give both the same one")
        return Unavailable("the model service is not available to this gateway")
    if name is not None:
        return from_grpc(code.name, name, failure.details() or "")
    logger.warning("call of the model service failed: %s: %s", code.name, failure.details())
    if code in _NOT_THERE:
        return Unavailable("the model service cannot be reached; try again shortly")
    return from_grpc(code.name, None, "the model service failed; its log says why")
