"""The model service as the gateway sees it: one gRPC channel, and nothing else is shared with it.

A failed call becomes an error of serving/errors.py. What the service said on purpose (it then names
the error in `mixtral-error`) is passed on; what gRPC says about addresses and sockets is for the
operator's log and never reaches a client.
"""

import asyncio
import logging
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.errors import ERROR_METADATA, EngineFailure, ServingError, Unavailable, from_grpc
from serving.proto import inference_pb2, inference_pb2_grpc

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # The service is a neighbour: a proxy set for the internet must not stand between.
    ("grpc.enable_http_proxy", 0),
    # An attempt to connect may take so long; calls that wait for it then fail.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    # A service that comes back is found within seconds, where gRPC's own default is two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
# Seconds for calls that the service answers from memory.
SHORT_CALL_SECONDS = 3.0

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

    def generate(self, request: inference_pb2.GenerateRequest) -> "Answer":
        """Starts an answer. The caller must `cancel()` it in the end, however it ends."""
        return Answer(self._inference.Generate(request, metadata=self._metadata))


class Answer:
    """One running Generate call."""

    def __init__(self, call: Any) -> None:
        self._call = call
        # A read outlives the patience of who waits for it: cancelling it would cancel the call.
        self._reading: asyncio.Task[Any] | None = None
        self._is_whole = False

    async def has_news(self, patience: float | None = None) -> bool:
        """Waits until `read` will return at once: True, or False after `patience` seconds."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
        await asyncio.wait({self._reading}, timeout=patience)
        return self._reading.done()

    async def read(self) -> inference_pb2.GenerateChunk | None:
        """The next chunk, None after the last one; raises the ServingError that ended the call."""
        await self.has_news()
        assert self._reading is not None
        reading, self._reading = self._reading, None
        try:
            chunk = reading.result()
        except grpc.aio.AioRpcError as failure:
            raise _error_of(failure) from failure
        if isinstance(chunk, inference_pb2.GenerateChunk):
            self._is_whole = chunk.HasField("usage")  # so the last chunk of all choices is known
            return chunk
        if not self._is_whole:
            raise EngineFailure("the model service ended its answer without a reason to finish")
        return None

    def cancel(self) -> None:
        """Frees all that the answer holds in the service; nothing happens if it has ended."""
        if self._reading is not None:
            self._reading.cancel()
        self._call.cancel()


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
