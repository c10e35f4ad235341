"""The model service as the gateway sees it: one gRPC channel, and nothing else is shared with it.

Behind the channel there may be any number of replicas (serving/channel.py).

A failed call becomes an error of serving/errors.py. An error that the service itself has named, in
the metadata `mixtral-error`, is passed on. Texts of gRPC about addresses and sockets are for the
operator's log, and never reach a client.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.accounting.answer_tokens import AnswerTokens
from serving.errors import CALLER_METADATA, Unavailable
from serving.gateway.aboard import Aboard
from serving.gateway.answer import Answer, error_of, is_gone
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
            if known is not None and not is_gone(failure):
                return known
            self._forget()
            raise error_of(failure) from failure
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
            if is_gone(failure):
                self._forget()
            raise error_of(failure) from failure

    async def check_ready(self) -> None:
        """Raises Unavailable unless the service says that it is serving."""
        try:
            answer = await self._health.Check(
                health_pb2.HealthCheckRequest(),
                metadata=self._metadata,
                timeout=SHORT_CALL_SECONDS,
            )
        except grpc.aio.AioRpcError as failure:
            if is_gone(failure):
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
    ) -> Answer:
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
