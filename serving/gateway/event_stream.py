"""An answer sent as server-sent events, and the watch for a client that goes away meanwhile.

The status of an answer is decided by the first message of the service, which comes when the prompt
has been rendered and queued, so that a failure before it is a plain HTTP error. While the prompt
waits and is computed, heartbeats show that the connection lives. After that message only the end of
the connection is left to show a failure: an event names the error, and the connection closes
without its terminating chunk, which no client takes for a complete answer.
"""

import asyncio
from collections.abc import Callable

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from serving.errors import ServingError
from serving.gateway.dialect.writers import EventWriter
from serving.gateway.joined_answers import RunningAnswer

STREAM_HEADERS = {
    # Written out, because some clients compare it to the letter; a charset would be added else.
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    # A proxy that gathers events before it passes them on would make a stream pointless.
    "x-accel-buffering": "no",
}


class StreamAborted(Exception):
    """Closes a connection in mid-answer. The client has read why; the access log has it as well."""


class DisconnectWatch:
    """Waits for the client to go away, and then cancels the answer that it waited for.

    The body of the request must have been read: the next message that can come is the client's end.

    Args:
        request: The client's request.
        answer: The answer to cancel.
    """

    def __init__(self, request: Request, answer: RunningAnswer) -> None:
        self.client_disconnected = False
        self._answer = answer
        self._task = asyncio.create_task(self._watch(request.receive))

    def end(self) -> None:
        """Stops watching, and frees everything that the answer holds in the service."""
        self._task.cancel()
        self._answer.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.client_disconnected = True
        self._answer.cancel()


class EventStream(Response):
    """Sends an answer as events, and frees it when the stream ends, in whatever way it ends.

    All chunks that have arrived are sent at once, so that the work for a token falls as the load
    grows.

    Args:
        events: Writes the events.
        answer: The answer, of which the chunks in `opening` have been read.
        opening: The first events.
        heartbeat_seconds: A stream that is silent for so long sends a heartbeat.
        watch: The watch for the client's end.
        end: Called once when the stream has ended.
    """

    def __init__(
        self,
        events: EventWriter,
        answer: RunningAnswer,
        opening: bytes,
        heartbeat_seconds: float,
        watch: DisconnectWatch,
        end: Callable[[], None],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(STREAM_HEADERS)
        self._events = events
        self._answer = answer
        self._opening = opening
        self._heartbeat_seconds = heartbeat_seconds
        self._watch = watch
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            start = {"type": "http.response.start", "status": self.status_code}
            await send(start | {"headers": self.raw_headers})
            await self._send(send, self._opening)
            await self._send_answer(send)
        finally:
            self._end()

    async def _send_answer(self, send: Send) -> None:
        answer, events, clock = self._answer, self._events, asyncio.get_running_loop().time
        # Chunks that show the progress of a prompt become no event: silence ends with an event.
        silent_until = clock() + self._heartbeat_seconds
        try:
            while True:
                while not await answer.has_news(max(0.0, silent_until - clock())):
                    await self._send(send, events.heartbeat())
                    silent_until = clock() + self._heartbeat_seconds
                if not (chunks := await answer.read_all()):
                    break
                if written := events.write(chunks):
                    await self._send(send, written)
                    silent_until = clock() + self._heartbeat_seconds
        except ServingError as error:
            if self._watch.client_disconnected:
                return
            await self._send(send, events.failure(error))
            raise StreamAborted from error
        if not self._watch.client_disconnected:
            end = {"type": "http.response.body", "body": events.closing(), "more_body": False}
            await send(end)

    @staticmethod
    async def _send(send: Send, written: bytes) -> None:
        await send({"type": "http.response.body", "body": written, "more_body": True})
