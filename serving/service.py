"""The gRPC service: proto on one side, the engine's worker on the other.

A request is checked and rendered to token ids (translation), and the tokens of each of its choices
become text, which stop texts may end (choices). `python -m serving` is one process with one engine.
"""

import asyncio
import hmac
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from mixtral_jax.tokenizer import Tokenizer
from serving.choices import Choice
from serving.errors import ERROR_METADATA, ServingError, Unauthenticated
from serving.proto import inference_pb2 as pb
from serving.proto import inference_pb2_grpc as rpc
from serving.translation import Translator
from serving.worker import EngineWorker

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name


class InferenceService(rpc.InferenceServicer):
    """Answers `mixtral.v1.Inference`."""

    def __init__(self, worker: EngineWorker, tokenizer: Tokenizer, info: pb.ModelInfo) -> None:
        self._worker = worker
        self._tokenizer = tokenizer
        self._info = info
        self._translator = Translator(tokenizer, info)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInfo:
        return self._info

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        try:
            async with aclosing(self._generate(request, context.time_remaining())) as chunks:
                async for chunk in chunks:
                    yield chunk
        except ServingError as error:
            await context.abort(
                grpc.StatusCode[error.grpc_status],
                str(error),
                ((ERROR_METADATA, type(error).__name__),),
            )

    async def _generate(
        self, message: pb.GenerateRequest, seconds: float | None
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        # A template or a long prompt takes milliseconds that other streams should not wait for.
        request = await asyncio.to_thread(self._translator.request, message, seconds)
        continues = message.HasField("token_ids")
        choices = [
            Choice(index, self._tokenizer, message.stop, continues=continues)
            for index in range(request.n)
        ]
        usage = pb.Usage(prompt_tokens=len(request.prompt_ids))
        async with aclosing(self._worker.submit(request)) as events:
            async for event in events:
                choice = choices[event.choice]
                if choice.has_ended:  # by a stop text, of which the engine knows nothing
                    continue
                usage.completion_tokens += 1
                chunk = choice.push(event)
                is_last = all(choice.has_ended for choice in choices)
                if chunk is not None:
                    if is_last:
                        chunk.usage.CopyFrom(usage)
                    yield chunk
                if is_last:
                    return  # which cancels what the engine still does


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
