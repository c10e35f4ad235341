"""One chat or text completion, asked of the model service and answered whole or as a stream.

The status of an answer is decided by the first message of the service, so whatever fails before it
is a plain HTTP error. After it only the end of the connection is left to tell of a failure: an
event names the error, and the connection closes without its terminating chunk, which no client
takes for a complete answer.

A client that drops cancels its call to the service, at every moment of its request.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serving.errors import ServingError
from serving.gateway.dialect.chat import response as reply
from serving.gateway.dialect.chat.request import Extras, read_chat, to_proto
from serving.gateway.dialect.fields import Parameters
from serving.gateway.dialect.sse import DONE, ChatEvents, Events, TextEvents
from serving.gateway.dialect.text.request import read_completion, to_protos
from serving.gateway.http import body
from serving.gateway.http.request_record import Exchange
from serving.gateway.joined_answers import Chorus
from serving.gateway.upstream import Answer, ModelService
from serving.proto import inference_pb2

STREAM_HEADERS = {
    # Spelt out, for some clients compare it to the letter and a charset would be added otherwise.
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    # A proxy that gathers events before it passes them on would make a stream pointless.
    "x-accel-buffering": "no",
}


class StreamAborted(Exception):
    """Closes a connection in mid-answer; the client has been told why, and the journal will be."""


@dataclass(frozen=True)
class Limits:
    """What the gateway puts up with."""

    heartbeat_seconds: float = 15.0
    """A stream that is silent for so long says that it lives."""
    body_bytes: int = body.LIMIT
    """That the body of a request may have."""
    body_seconds: float = body.SECONDS
    """That it may take to arrive."""


@dataclass(frozen=True)
class Dialect:
    """How one kind of request is answered."""

    operation: str  # as OpenTelemetry names it
    events: type[Events]
    whole: Callable[[reply.Identity, reply.Chunks], BaseModel]


CHAT = Dialect("chat", ChatEvents, reply.chat_completion)
TEXT = Dialect("text_completion", TextEvents, reply.text_completion)


class Gateway:
    """What the routes work with: the model service, and the limits they keep."""

    def __init__(self, service: ModelService, limits: Limits) -> None:
        self.service = service
        self._limits = limits

    async def chat(self, request: Request, extras: Extras) -> Response:
        """Answers a chat request, at once or as a stream."""
        chat = read_chat(await self._read(request), extras)
        return await self._answer(request, chat, [to_proto(chat)], CHAT)

    async def complete(self, request: Request) -> Response:
        """Answers a text completion request, at once or as a stream."""
        completion = read_completion(await self._read(request))
        return await self._answer(request, completion, to_protos(completion), TEXT)

    async def _read(self, request: Request) -> bytes:
        return await body.read_body(request, self._limits.body_bytes, self._limits.body_seconds)

    async def _answer(
        self,
        request: Request,
        asked: Parameters,
        messages: Sequence[inference_pb2.GenerateRequest],
        dialect: Dialect,
    ) -> Response:
        exchange = Exchange.of(request)
        model = (await self.service.model()).name
        identity = reply.Identity.new(model, exchange.id)
        answers: list[Answer] = []
        try:
            for message in messages:
                answers.append(
                    exchange.ask(
                        self.service,
                        message,
                        operation=dialect.operation,
                        asked=asked.model,
                        model=model,
                    )
                )
        except BaseException:
            for one in answers:
                one.cancel()
            raise
        answer = answers[0] if len(answers) == 1 else Chorus(answers, asked.choices)
        watch = Watch(request, answer)
        try:
            chunks = await answer.read_all()
            if asked.stream and not watch.has_seen_the_client_go:
                events = dialect.events(identity, asked.include_usage)
                opening = events.opening(asked.choices * len(answers)) + events.of(chunks)
                seconds = self._limits.heartbeat_seconds
                return EventStream(identity, events, answer, watch, opening, seconds)
            while more := await answer.read_all():
                chunks += more
        except BaseException:
            watch.end()
            if watch.has_seen_the_client_go:
                raise ClientDisconnect from None
            raise
        watch.end()
        if watch.has_seen_the_client_go:
            raise ClientDisconnect
        return JSONResponse(dialect.whole(identity, chunks).model_dump())


class Watch:
    """Waits for the client to go, and then gives up the answer that it waited for.

    The body of the request must have been read: the next that can come is the end of the client.
    """

    def __init__(self, request: Request, answer: Answer | Chorus) -> None:
        self.has_seen_the_client_go = False
        self._answer = answer
        self._watching = asyncio.create_task(self._watch(request.receive))

    def end(self) -> None:
        """No more watching; and what the answer holds in the service is free."""
        self._watching.cancel()
        self._answer.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.has_seen_the_client_go = True
        self._answer.cancel()


class EventStream(Response):
    """A stream of events that gives up its answer when it ends, in whatever way it ends.

    All that has arrived is sent at once, so that the work for a token falls as the load grows.
    """

    def __init__(
        self,
        identity: reply.Identity,
        events: Events,
        answer: Answer | Chorus,
        watch: Watch,
        opening: bytes,
        heartbeat_seconds: float,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(STREAM_HEADERS)
        self._identity = identity
        self._events = events
        self._answer = answer
        self._watch = watch
        self._opening = opening
        self._heartbeat_seconds = heartbeat_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            start = {"type": "http.response.start", "status": self.status_code}
            await send(start | {"headers": self.raw_headers})
            await self._send(send, self._opening)
            await self._send_answer(send)
        finally:
            self._watch.end()

    async def _send_answer(self, send: Send) -> None:
        answer, events = self._answer, self._events
        try:
            while True:
                while not await answer.has_news(self._heartbeat_seconds):
                    await self._send(send, events.heartbeat())
                if not (chunks := await answer.read_all()):
                    break
                if written := events.of(chunks):
                    await self._send(send, written)
        except ServingError as error:
            if self._watch.has_seen_the_client_go:
                return
            await self._send(send, events.failure(error))
            raise StreamAborted(self._identity.id) from error
        if not self._watch.has_seen_the_client_go:
            await send({"type": "http.response.body", "body": DONE, "more_body": False})

    @staticmethod
    async def _send(send: Send, written: bytes) -> None:
        await send({"type": "http.response.body", "body": written, "more_body": True})
