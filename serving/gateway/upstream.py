"""The model service as the gateway sees it: one gRPC channel, and nothing else is shared with it.

Behind the channel there may be any number of replicas (serving/channel.py).

A failed call becomes an error of serving/errors.py. An error that the service itself has named, in
the metadata `mixtral-error`, is passed on. Texts of gRPC about addresses and sockets are for the
operator's log, and never reach a client.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.accounting.answer_tokens import AnswerTokens
from serving.errors import (
    CALLER_METADATA,
    ERROR_METADATA,
    WEAKENED_METADATA,
    EngineFailure,
    Forbidden,
    ServingError,
    Unavailable,
    from_grpc,
)
from serving.gateway.aboard import Aboard, Sent
from serving.gateway.call_attributes import call_attributes, server_attributes
from serving.gateway.http.request_record import ModelCall, RequestRecord
from serving.gateway.joined_answers import JoinedAnswers, RunningAnswer
from serving.observe.tracing import CLIENT
from serving.proto import inference_pb2, inference_pb2_grpc

# Seconds for calls that the service answers from memory.
SHORT_CALL_SECONDS = 3.0
# Seconds for calls that the service answers in threads, which callers may have to wait for.
CALL_SECONDS = 60.0
# Seconds for which the served model is remembered: replicas may be replaced by those of another.
MODEL_SECONDS = 60.0
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


class ModelService:
    """Calls the model service with the gateway's key.

    Args:
        channel: An open channel to the service or its replicas.
        key: The key that the service is shown.
        target: The service as gRPC names it, for spans.
        clock: Returns seconds, like time.monotonic.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        key: str,
        target: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._aboard = Aboard()
        self.use(channel)
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._model: inference_pb2.ModelInfo | None = None
        self._asked_at = 0.0
        self._clock = clock
        self._server = server_attributes(target)

    def use(self, channel: grpc.aio.Channel) -> None:
        """Sends all later calls over this channel; those under way go on over theirs."""
        self._channel = channel
        self._inference = inference_pb2_grpc.InferenceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)

    async def model(self, seconds: float = MODEL_SECONDS) -> inference_pb2.ModelInfo:
        """Returns the served model, which is remembered for so many seconds.

        It is forgotten as soon as a service is gone: what comes back may serve another one.

        Raises:
            ServingError: It is not known, and the service does not tell it.
        """
        known = self._model
        if known is not None and self._clock() - self._asked_at < seconds:
            return known
        self._asked_at = self._clock()  # others take what is known meanwhile
        try:
            model: inference_pb2.ModelInfo = await self._inference.GetModelInfo(
                inference_pb2.GetModelInfoRequest(),
                metadata=self._metadata,
                timeout=SHORT_CALL_SECONDS,
            )
        except grpc.aio.AioRpcError as failure:
            if known is not None and not _is_gone(failure):
                return known
            self._forget()
            raise _error_of(failure) from failure
        self._model = model
        return model

    def _forget(self) -> None:
        self._model = None

    async def tokenize(
        self, request: inference_pb2.TokenizeRequest, caller: str
    ) -> inference_pb2.Tokens:
        """Returns the tokens of a text or a chat; raises ServingError.

        Args:
            request: The call.
            caller: Who asks: callers take turns.
        """
        tokens: inference_pb2.Tokens = await self._call(self._inference.Tokenize, request, caller)
        return tokens

    async def detokenize(
        self, request: inference_pb2.DetokenizeRequest, caller: str
    ) -> inference_pb2.Text:
        """Returns the text of tokens; raises ServingError."""
        text: inference_pb2.Text = await self._call(self._inference.Detokenize, request, caller)
        return text

    async def metrics(self) -> bytes:
        """Returns the metrics of the service in Prometheus' text format; raises ServingError."""
        request = inference_pb2.GetMetricsRequest()
        metrics: inference_pb2.Metrics = await self._call(self._inference.GetMetrics, request)
        return metrics.text

    async def _call(
        self, method: Callable[..., Awaitable[Any]], request: Any, caller: str = ""
    ) -> Any:
        """Returns the answer of a call without a stream."""
        metadata: tuple[tuple[str, str | bytes], ...] = self._metadata
        if caller:
            metadata = (*metadata, (CALLER_METADATA, caller.encode()))
        try:
            return await method(request, metadata=metadata, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as failure:
            if _is_gone(failure):
                self._forget()
            raise _error_of(failure) from failure

    async def check_ready(self) -> None:
        """Raises Unavailable unless the service says that it is serving."""
        try:
            answer = await self._health.Check(
                health_pb2.HealthCheckRequest(),
                metadata=self._metadata,
                timeout=SHORT_CALL_SECONDS,
            )
        except grpc.aio.AioRpcError as failure:
            if _is_gone(failure):
                self._forget()
            raise Unavailable("the model service does not answer; try again shortly") from failure
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise Unavailable("the model service is not ready; try again shortly")

    def ask(
        self,
        requests: Sequence[inference_pb2.GenerateRequest],
        record: RequestRecord,
        operation: str,
        asked_model: str | None,
        model: str,
        complete: Callable[
            [inference_pb2.GenerateRequest], inference_pb2.GenerateRequest
        ] = lambda request: request,
        at_a_time: int = 1,
    ) -> RunningAnswer:
        """Asks the service, a call for each prompt, and writes the calls into the record.

        Of many calls some are under way, and the others follow as these end.

        Args:
            requests: The calls; their answers are joined in this order.
            record: The record of the HTTP request, whose id and trace go with the calls.
            operation: "chat" or "text_completion", as OpenTelemetry names them.
            asked_model: The model that the client asked for.
            model: The served name.
            complete: Returns a call with all its fields, just before it is sent.
            at_a_time: The number of calls that are under way at a time, at most.

        Returns:
            The answer, which the caller must `cancel()` in the end, however it ends.
        """
        asked_model = asked_model or model
        counts = [AnswerTokens() for _ in requests]
        begun: dict[int, ModelCall] = {}

        def start(place: int) -> Answer:
            request = complete(requests[place])
            if place not in begun:  # else there was no room for it before
                # The name of the model asked for is the client's choice: names must stay few.
                span = record.span.child(f"{operation} {model}", kind=CLIENT)
                if span.is_recording:
                    span.set(self._server | call_attributes(operation, asked_model, request))
                if record.keeps_texts:
                    counts[place].texts = {}
                begun[place] = ModelCall(model, requests[place], counts[place], span)
                record.calls.append(begun[place])
            carrier = begun[place].span.carrier()
            return self.generate(request, (("x-request-id", record.id), *carrier), counts[place])

        if len(requests) == 1:
            return start(0)
        return JoinedAnswers(start, counts, requests[0].n or 1, at_a_time)

    def generate(
        self,
        request: inference_pb2.GenerateRequest,
        metadata: Sequence[tuple[str, str]] = (),
        tokens: AnswerTokens | None = None,
    ) -> "Answer":
        """Starts an answer, which the caller must `cancel()` in the end, however it ends.

        Args:
            request: The call.
            metadata: Goes with the call beside the gateway's key, such as a request's id and trace.
            tokens: Counts the answer; by default new ones.

        Raises:
            ServingError: The request has killed the service before.
        """
        sent = self._aboard.send(request)
        is_connected = self._channel.get_state() is grpc.ChannelConnectivity.READY
        call = self._inference.Generate(request, metadata=(*self._metadata, *metadata))
        return Answer(call, sent, tokens, is_connected=is_connected, on_gone=self._forget)


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
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        # Cancelling gRPC's read cancels the call, so that no wait with a timeout may contain it.
        self._reading = asyncio.create_task(self._read_ahead())

    @property
    def has_begun(self) -> bool:
        """True when the prompt has been rendered and queued."""
        (tokens,) = self.tokens
        return bool(tokens.prompt_tokens or tokens.completion_tokens)

    async def has_news(self, seconds: float | None = None) -> bool:
        """Waits until a read will return at once; returns False if `seconds` pass before."""
        if not (self._arrived or self._has_ended):
            self._news.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._news.wait()
        return bool(self._arrived) or self._has_ended

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
                self._news.set()
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
            if _is_gone(failure):
                self._on_gone()
            self._failure = _error_of(failure)
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
            self._news.set()


def _weakened_in(metadata: Any) -> str:
    """Returns what initial metadata says of the parts of a schema that are not enforced."""
    return next((str(value) for key, value in metadata or () if key == WEAKENED_METADATA), "")


def _is_gone(failure: grpc.aio.AioRpcError) -> bool:
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


def _error_of(failure: grpc.aio.AioRpcError) -> ServingError:
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
