"""The gateway: the HTTP endpoint that clients of Azure's and OpenAI's chat API already speak.

It holds a stub of the model service and nothing else. A request is let in (auth), read (schema),
asked of the service (upstream) and answered (reply). The status of an answer is decided by the
first message of the service, so whatever fails before it is a plain HTTP error. After it only the
end of the connection is left to tell of a failure: an event names the error, and the connection
closes without its terminating chunk, which no client takes for a complete answer.

A client that drops cancels its call to the service, at every moment of its request.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serving.errors import (
    EngineFailure,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestTooLarge,
    ServingError,
    Unauthenticated,
)
from serving.gateway import reply
from serving.gateway.auth import Keys
from serving.gateway.schema import ChatRequest, Extras, read_chat, to_proto
from serving.gateway.upstream import CHANNEL_OPTIONS, Answer, ModelService
from serving.proto import inference_pb2

BODY_LIMIT = 4 * 2**20
HEARTBEAT_SECONDS = 15.0

STREAM_HEADERS = {
    # Spelt out, for some clients compare it to the letter and a charset would be added otherwise.
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    # A proxy that gathers events before it passes them on would make a stream pointless.
    "x-accel-buffering": "no",
}

logger = logging.getLogger(__name__)
T = TypeVar("T")


class StreamAborted(Exception):
    """Closes a connection in mid-answer; the client has been told why, and the log as well."""


def create_app(
    target: str,
    keys: Sequence[str],
    *,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
    body_limit: int = BODY_LIMIT,
) -> FastAPI:
    """The gateway as an ASGI application.

    Args:
        target: The model service as gRPC names it, such as "127.0.0.1:50051".
        keys: The keys that clients may present; the service is shown the first of them.
        heartbeat_seconds: A stream that is silent for so long says that it lives.
        body_limit: Bytes that the body of a request may have.

    Raises:
        ValueError: There is no key, or one that no header could carry.
    """
    guard = Keys(keys)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) as channel:
            service = ModelService(channel, keys[0])
            app.state.gateway = Gateway(service, heartbeat_seconds, body_limit)
            yield

    app = FastAPI(
        title="mixtral-jax",
        lifespan=lifespan,
        # Their pages fetch scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        # A redirect would have clients repeat their key and body, or lose them.
        redirect_slashes=False,
    )
    guarded = [Depends(guard.require)]
    app.add_api_route("/chat/completions", azure_chat, methods=["POST"], dependencies=guarded)
    app.add_api_route("/v1/chat/completions", openai_chat, methods=["POST"], dependencies=guarded)
    app.add_api_route("/info", info, methods=["GET"], dependencies=guarded)
    app.add_api_route("/health/live", live, methods=["GET"])
    app.add_api_route("/health/ready", ready, methods=["GET"])
    app.add_exception_handler(ServingError, on_serving_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    app.add_exception_handler(Exception, on_bug)
    return app


class Gateway:
    """What the routes work with: the model service, and the limits they keep."""

    def __init__(self, service: ModelService, heartbeat_seconds: float, body_limit: int) -> None:
        self.service = service
        self._heartbeat_seconds = heartbeat_seconds
        self._body_limit = body_limit

    async def chat(self, request: Request, extras: Extras) -> Response:
        """Answers a chat request, at once or as a stream."""
        chat = read_chat(await _read_body(request, self._body_limit), extras)
        identity = reply.Identity.new((await self.service.model()).name)
        answer = self.service.generate(to_proto(chat))
        try:
            first = await _unless_dropped(request, answer.read())
            if chat.stream:
                return EventStream(answer, self._events(chat, identity, answer, first))
            chunks = await _unless_dropped(request, _collect(answer, first))
        except BaseException:
            answer.cancel()
            raise
        return JSONResponse(reply.completion(identity, chunks).model_dump())

    async def _events(
        self,
        chat: ChatRequest,
        identity: reply.Identity,
        answer: Answer,
        chunk: inference_pb2.GenerateChunk | None,
    ) -> AsyncIterator[bytes]:
        include_usage = bool(chat.stream_options and chat.stream_options.include_usage)
        for index in range(chat.n or 1):
            yield reply.event(reply.opening(identity, index))
        try:
            while chunk is not None:
                for piece in reply.chunks_of(identity, chunk, include_usage):
                    yield reply.event(piece)
                while not await answer.has_news(self._heartbeat_seconds):
                    yield reply.event(reply.heartbeat(identity))
                chunk = await answer.read()
        except ServingError as error:
            logger.error("answer %s broke off: %s: %s", identity.id, type(error).__name__, error)
            yield reply.event(reply.failure(identity, error))
            raise StreamAborted(identity.id) from error
        yield reply.DONE


class EventStream(StreamingResponse):
    """A stream of events that gives up its answer when it ends, in whatever way it ends."""

    def __init__(self, answer: Answer, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, headers=STREAM_HEADERS)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


async def azure_chat(request: Request) -> Response:
    """The bare route: Azure's API, which is strict about parameters that it does not list."""
    headers = request.headers
    # The shorter name is the one in Microsoft's own sample for JavaScript.
    policy = headers.get("extra-parameters") or headers.get("extra-params")
    return await _gateway(request).chat(request, Extras.from_header(policy))


async def openai_chat(request: Request) -> Response:
    """The route of OpenAI's and Mistral's clients, which send what they like."""
    return await _gateway(request).chat(request, Extras.LENIENT)


async def info(request: Request) -> Response:
    """Which model is served."""
    model = await _gateway(request).service.model()
    return JSONResponse(reply.model_info(model).model_dump())


async def live() -> Response:
    """200 for as long as the process lives."""
    return JSONResponse({"status": "live"})


async def ready(request: Request) -> Response:
    """200 if the model service serves, 503 until then."""
    await _gateway(request).service.check_ready()
    return JSONResponse({"status": "ready"})


async def on_serving_error(request: Request, error: Exception) -> Response:
    """Every answer that is not 2xx comes from here."""
    assert isinstance(error, ServingError)
    headers = {"x-ms-error-code": error.azure_code}
    if error.retry_after is not None:
        # Clients of Azure's repeat whatever carries this header, so nothing else may.
        headers["retry-after"] = str(error.retry_after)
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, RequestTooLarge):
        # What the client has not sent yet shall not be waited for.
        headers["connection"] = "close"
    if isinstance(error, EngineFailure):
        headers["ms-azureml-model-error-reason"] = "model_error"
        headers["ms-azureml-model-error-statuscode"] = "500"
    body = reply.error_body(error).model_dump()
    return JSONResponse(body, status_code=error.http_status, headers=headers)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """The router's own errors, in our shape."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    ours: ServingError = InvalidRequest(str(error.detail))
    if error.status_code == MethodNotAllowed.http_status:
        ours = MethodNotAllowed(f"{what}: method not allowed here")
    if error.status_code == NotFound.http_status:
        ours = NotFound(f"{what}: not found; chats go to POST /chat/completions")
    response = await on_serving_error(request, ours)
    response.headers.update(error.headers or {})
    return response


async def on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody is there to read it."""
    return Response(status_code=499)


async def on_bug(request: Request, error: Exception) -> Response:
    """An exception that is nobody's but ours; the server logs its traceback."""
    return await on_serving_error(request, ServingError("the gateway failed; its log says why"))


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


async def _read_body(request: Request, limit: int) -> bytes:
    too_large = RequestTooLarge(f"the body is larger than {limit} bytes")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise too_large
    return bytes(body)


async def _collect(
    answer: Answer, chunk: inference_pb2.GenerateChunk | None
) -> list[inference_pb2.GenerateChunk]:
    chunks = []
    while chunk is not None:
        chunks.append(chunk)
        chunk = await answer.read()
    return chunks


async def _unless_dropped(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; raises ClientDisconnect, and gives it up, if the client goes first.

    The body of the request must have been read: the next that can come is the end of the client.
    """
    working = asyncio.create_task(work)
    watching = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
