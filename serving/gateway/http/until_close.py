"""Answers to requests in HTTP/1.0, which has no chunks."""

from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle


class CycleUntilClose(RequestResponseCycle):
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
