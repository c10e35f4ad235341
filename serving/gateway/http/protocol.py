"""HTTP/1.1 as the gateway listens: uvicorn's fast parser, which of itself has no limits.

A head that is too long or too slow ends its connection, and what is no HTTP is told so in the one
shape of errors. Bodies have limits of their own (body).
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.errors import DeadlineExceeded, InvalidRequest, ServingError
from serving.gateway.dialect.error_body import error_body

HEAD_LIMIT = 64 * 2**10
HEAD_SECONDS = 30.0


class Protocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._waiting: asyncio.TimerHandle | None = None  # for the head that is under way
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client that connects must send a head."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._expect_nothing()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """The next head begins."""
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        """It is whole."""
        self._expect_nothing()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Reads on; a head that is still not whole must not be endless."""
        super().data_received(data)
        if self._waiting is None:
            return
        self._head_bytes += len(data)
        if self._head_bytes > HEAD_LIMIT:
            self._refuse(InvalidRequest(f"the headers have more than {HEAD_LIMIT:,} bytes"))

    def send_400_response(self, msg: str) -> None:
        """What uvicorn says of something that it cannot read."""
        self._refuse(InvalidRequest("this is not a request in HTTP/1.1"))

    def _expect_head(self) -> None:
        self._expect_nothing()
        self._head_bytes = 0
        self._waiting = self.loop.call_later(HEAD_SECONDS, self._refuse_slow)

    def _expect_nothing(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _refuse_slow(self) -> None:
        if self._head_bytes == 0:  # a connection kept ready: nothing was asked that could fail
            return self.transport.close()
        self._refuse(DeadlineExceeded(f"the headers did not arrive in {HEAD_SECONDS:g} seconds"))

    def _refuse(self, error: ServingError) -> None:
        self._expect_nothing()
        if self.transport.is_closing():
            return
        body = error_body(error).model_dump_json().encode()
        head = (
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-ms-error-code: {error.azure_code}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[error.http_status] + head.encode() + body)
        self.transport.close()
