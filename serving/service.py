"""The gRPC service: proto on one side, the engine's worker on the other.

A request is checked and rendered to token ids here, its tokens become text here, and stop texts
end it here. `python -m serving` is one process with one engine.
"""

import asyncio
import hmac
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from mixtral_jax.tokenizer import ChatError, Message, Tokenizer
from serving.errors import (
    ERROR_METADATA,
    ContextTooLong,
    InvalidParameter,
    InvalidRequest,
    ServingError,
    Unauthenticated,
)
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from serving.request import FinishReason, Request, SamplingParams
from serving.text import StopTexts
from serving.worker import EngineWorker

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name
DEFAULT_TEMPERATURE = 0.7  # azure-ai-inference's documented default

_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class InferenceService(rpc.InferenceServicer):
    """Answers `mixtral.v1.Inference`."""

    def __init__(self, worker: EngineWorker, tokenizer: Tokenizer, info: pb.ModelInfo) -> None:
        self._worker = worker
        self._tokenizer = tokenizer
        self._info = info
        pieces = (tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))
        # No text of more bytes fits the context. Encoding it to find out would take seconds, in
        # which nothing else in this process runs.
        self._most_bytes = info.max_context * max(map(len, pieces))

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInfo:
        return self._info

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        try:
            async with aclosing(self._generate(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except ServingError as error:
            await context.abort(
                grpc.StatusCode[error.grpc_status],
                str(error),
                ((ERROR_METADATA, type(error).__name__),),
            )

    async def _generate(
        self, message: pb.GenerateRequest
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        # A template or a long prompt takes milliseconds that other streams should not wait for.
        request = await asyncio.to_thread(self._request, message)
        stops = StopTexts(message.stop)
        detokenizer = self._tokenizer.detokenizer(continues=message.HasField("token_ids"))
        usage = pb.Usage(prompt_tokens=len(request.prompt_ids))
        unsent: list[int] = []
        async with aclosing(self._worker.submit(request)) as events:
            async for event in events:
                unsent.append(event.token_id)
                usage.completion_tokens += 1
                reason = event.finish_reason
                text = stops.push(detokenizer.push(event.token_id))
                if reason is not None:
                    text += stops.push(detokenizer.finish()) + stops.finish()
                if stops.stopped:
                    reason = FinishReason.STOP
                if reason is not None:
                    yield pb.GenerateChunk(
                        text=text, token_ids=unsent, finish_reason=_FINISH[reason], usage=usage
                    )
                    return
                if text:
                    yield pb.GenerateChunk(text=text, token_ids=unsent)
                    unsent = []

    def _request(self, message: pb.GenerateRequest) -> Request:
        """Checks and renders a request; raises InvalidRequest naming the field."""
        prompt = self._prompt_ids(message)
        sampling = message.sampling
        temperature = (
            sampling.temperature if sampling.HasField("temperature") else DEFAULT_TEMPERATURE
        )
        top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
        seed = sampling.seed if sampling.HasField("seed") else secrets.randbits(31)
        max_tokens = message.max_tokens if message.HasField("max_tokens") else 2**31
        if not 0 <= temperature <= 2:
            raise InvalidParameter(f"temperature is {temperature:g}; it must be within 0 and 2")
        if not 0 <= top_p <= 1:
            raise InvalidParameter(f"top_p is {top_p:g}; it must be within 0 and 1")
        if max_tokens < 1:
            raise InvalidParameter("max_tokens is 0; ask for at least 1 token")
        if "" in message.stop:
            raise InvalidParameter("stop holds an empty text; leave it out")
        return Request(
            id=secrets.token_hex(16),
            prompt_ids=tuple(prompt),
            sampling=SamplingParams(temperature=temperature, top_p=top_p, seed=seed & 0x7FFFFFFF),
            max_tokens=max_tokens,
            eos_ids=self._tokenizer.eos_ids,
        )

    def _prompt_ids(self, message: pb.GenerateRequest) -> Sequence[int]:
        match message.WhichOneof("prompt"):
            case "chat":
                chat: list[Message] = [
                    {"role": m.role, "content": m.content} for m in message.chat.messages
                ]
                size = sum(len(m["content"].encode()) for m in chat)
                if size > self._most_bytes:
                    raise ContextTooLong(
                        f"the messages have {size:,} bytes; the {self._info.max_context:,} tokens "
                        "of this server's context cannot hold so many: shorten them"
                    )
                try:
                    return self._tokenizer.chat(chat)
                except ChatError as error:
                    raise InvalidRequest(str(error)) from None
            case "token_ids":
                ids = message.token_ids.ids
                if not ids:
                    raise InvalidRequest("token_ids is empty; give at least one id")
                if max(ids) >= self._info.vocab_size:
                    raise InvalidRequest(
                        f"token_ids holds {max(ids)}; ids are below {self._info.vocab_size}"
                    )
                return ids
            case _:
                raise InvalidRequest("prompt is missing; set chat or token_ids")


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without the key; health checks need none."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        if handler is None or details.method.startswith(f"/{health.SERVICE_NAME}/"):
            return handler
        metadata = dict(details.invocation_metadata or ())
        given = metadata.get("api-key") or metadata.get("authorization", "")
        given = str(given).removeprefix("Bearer ").encode()
        if hmac.compare_digest(given, self._key):
            return handler
        return _refusal(handler)


def _refusal(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """A handler of the same kind that ends every call with UNAUTHENTICATED."""
    text = "no key or a wrong one; send metadata `authorization: Bearer KEY`"

    async def unary(request: object, context: grpc.aio.ServicerContext) -> None:
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED, text, ((ERROR_METADATA, Unauthenticated.__name__),)
        )

    async def stream(request: object, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        await unary(request, context)
        yield

    codec = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(stream, **codec)
    return grpc.unary_unary_rpc_method_handler(unary, **codec)


async def create_server(
    address: str, service: InferenceService, key: str
) -> tuple[grpc.aio.Server, int, HealthServicer]:
    """A started server on `address` (port 0 chooses one): (server, port, health), SERVING.

    Raises OSError if the address is taken.
    """
    # Without this, two servers could share a port and each would get half of the requests.
    server = grpc.aio.server(interceptors=[KeyInterceptor(key)], options=[("grpc.so_reuseport", 0)])
    rpc.add_InferenceServicer_to_server(service, server)
    checks = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        raise OSError(f"cannot listen on {address}; is another server running there?") from None
    await server.start()
    await set_serving(checks, True)
    return server, port, checks


async def set_serving(checks: HealthServicer, serving: bool) -> None:
    """What grpc.health.v1 answers for the server as a whole and for Inference."""
    status = (
        health_pb2.HealthCheckResponse.SERVING
        if serving
        else health_pb2.HealthCheckResponse.NOT_SERVING
    )
    for name in ("", SERVICE_NAME):
        await checks.set(name, status)
