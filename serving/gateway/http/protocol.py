"""HTTP/1.1 as the gateway speaks it: uvicorn's fast parser, with limits that it does not have.

A head that is too long or too slow ends its connection. Bytes that are no HTTP get an error in the
same shape as all others. Bodies have limits of their own (body.py). A stream that was asked for in
HTTP/1.0, which has no chunks, ends with its connection.

A client that closes its sending side is taken to have gone away, because TCP shows nothing else
when a client drops, and the answer of a dropped client must not go on being computed.
"""

import asyncio
from typing import Any

from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from serving.errors import DeadlineExceeded, InvalidRequest, ServingError
from serving.gateway.dialect.error_body import error_body


class Protocol(HttpToolsProtocol):
    """One connection.

    Attributes:
        head_limit: Bytes that a request's head may have.
        head_seconds: Seconds that a head may take to arrive.
    """

    head_limit = 64 * 2**10
    head_seconds = 30.0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_timer: asyncio.TimerHandle | None = None  # set while a head is awaited
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts waiting for the first head."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends all waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Starts waiting for the rest of the next head."""
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        """Ends the waiting, because the head is whole."""
        self._stop_waiting()
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            # Its task has been created, but has not begun to run.
            self.cycle.__class__ = _CycleUntilClose

    def data_received(self, data: bytes) -> None:
        """Reads on, and refuses a head that is longer than `head_limit`."""
        super().data_received(data)
        if self._head_timer is None:
            return
        self._head_bytes += len(data)
        if self._head_bytes > self.head_limit:
            self._refuse(InvalidRequest(f"the headers have more than {self.head_limit:,} bytes"))

    def send_400_response(self, msg: str) -> None:
        """Refuses bytes that uvicorn cannot read."""
        self._refuse(InvalidRequest("this is not a request in HTTP/1.1"))

    def _expect_head(self) -> None:
        self._stop_waiting()
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self.head_seconds, self._refuse_slow)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse_slow(self) -> None:
        if self._head_bytes == 0:  # an idle connection: there is no request that could fail
            return self.transport.close()
        seconds = self.head_seconds
        self._refuse(DeadlineExceeded(f"the headers did not arrive in {seconds:g} seconds"))

    def _refuse(self, error: ServingError) -> None:
        self._stop_waiting()
        if self.transport.is_closing():
            return
        body = error_body(error).model_dump_json().encode()
        head = (
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-ms-error-code: {error.azure_code}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[error.http_status] + head.encode() + body)
        self.transport.close()


class _CycleUntilClose(RequestResponseCycle):
    """A request in HTTP/1.0: an answer without a length is sent as it is, and ends by closing.

    RFC 9112, section 6.1: a server must not send Transfer-Encoding to a client of HTTP/1.0.
    """

    _has_length = True

    async def send(self, message: Message) -> None:  # type: ignore[override]
        """Sends a message of ASGI."""
        is_start = message["type"] == "http.response.start"
        if is_start:
            names = {name.lower() for name, _ in message["headers"]}
            self._has_length = b"content-length" in names or self.scope["method"] == "HEAD"
        if self._has_length:
            return await super().send(message)  # type: ignore[arg-type]
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if is_start:
            self.response_started = True
            self.waiting_for_100_continue = False
            headers = [*self.default_headers, *message["headers"], (b"connection", b"close")]
            lines = [b"%s: %s\r\n" % header for header in headers]
            self.transport.write(STATUS_LINE[message["status"]] + b"".join(lines) + b"\r\n")
            return
        self.transport.write(message.get("body", b""))
        if not message.get("more_body", False):
            self.response_complete = True
            self.message_event.set()
            self.transport.close()
            self.on_response()
