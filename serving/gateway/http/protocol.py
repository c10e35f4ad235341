"""HTTP/1.1 as the gateway speaks it: uvicorn's fast parser, with limits that it does not have.

Every byte that arrives counts against a limit: of the head, of the body (body.py), or of what
frames a body, its trailers included. Trailers are dropped, because no sender may add headers there
that the recipient does not expect (RFC 9110, section 6.5.1). A connection without a running answer
has a deadline at every moment. Bytes that are no HTTP get an error in the same shape as all others.

A request that comes before the answer to the one before it (pipelining) is parsed when that answer
is complete. A stream that was asked for in HTTP/1.0, which has no chunks, ends with its connection.

A client that closes its sending side is taken to have gone away, because TCP shows nothing else
when a client drops, and the answer of a dropped client must not go on being computed.
"""

import asyncio
import enum
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.errors import DeadlineExceeded, InvalidRequest, ServingError
from serving.gateway.dialect.error_body import error_body
from serving.gateway.http.access_log import log_refusal
from serving.gateway.http.connections import Connections, Place
from serving.gateway.http.until_close import CycleUntilClose

# The parser is fed in pieces of so many bytes, after each of which the limits are checked.
_PIECE = 4096
# Bytes that may wait behind a running answer before the connection is no longer read.
_MAX_WAITING = 2**16
# Bytes that may frame a byte of a body: a chunk of one byte needs five more.
_FRAME_PER_BYTE = 8


class _Phase(enum.Enum):
    """The state of a connection."""

    HEAD = "a head is awaited or arriving"
    BUSY = "a request is being answered"
    REST = "a request is answered, and its body is still arriving"
    IDLE = "nothing, between two requests"


class _Flow(FlowControl):
    """uvicorn's control of reading and writing, with a condition for reading on."""

    def __init__(self, transport: asyncio.Transport, may_read: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._may_read = may_read

    def resume_reading(self) -> None:
        """Reads on, unless too much waits."""
        if self._may_read():
            super().resume_reading()


class Protocol(HttpToolsProtocol):
    """One connection; the arguments beside `connections` and `place` are uvicorn's.

    Args:
        connections: The connections that this one belongs to; it holds their limits.
        place: Its place among them.
    """

    def __init__(
        self, *arguments: Any, connections: Connections, place: Place, **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self._connections = connections
        self._limits = connections.limits
        self._place = place
        self.timeout_keep_alive = connections.limits.keep_alive_seconds  # type: ignore[assignment]
        self._phase: _Phase | None = None
        self._timer: asyncio.TimerHandle | None = None  # of the phase
        self._write_timer: asyncio.TimerHandle | None = None
        self._waiting = bytearray()  # came behind the request that is being answered
        self._refusal: ServingError | None = None  # after which nothing more is parsed
        # The current message:
        self._in_head = False
        self._in_message = False
        self._head_bytes = 0  # also bytes before a head
        self._frame_bytes = 0  # beside the head and the body
        self._unbroken_frame_bytes = 0  # since the last byte of the body
        self._body_bytes = 0
        self._rest_bytes = 0  # since its answer was complete
        # The current piece:
        self._num_begun = 0
        self._num_heads = 0
        self._piece_body_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts waiting for the first head."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self._may_read)
        self._place.end = transport.abort
        # Every byte that the client does not take starts the time of `pause_writing`. A transport
        # with TLS counts from the limit on, others from the byte behind it.
        transport.set_write_buffer_limits(high=1 if self.scheme == "https" else 0, low=0)
        self._enter(_Phase.HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends all waiting, and gives the place back."""
        self._stop_timer()
        self.resume_writing()
        self._place.leave()
        self._waiting.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses what arrived, if nothing is being answered; refuses what is over a limit."""
        if self._refusal is not None or self._waits_for_answer:
            self._waiting += data
            if not self._may_read():
                self.flow.pause_reading()
        else:
            self._parse(data)

    def on_message_begin(self) -> None:
        """Notes that a head begins."""
        super().on_message_begin()
        self._in_head = self._in_message = True
        self._num_begun += 1
        self._frame_bytes = self._unbroken_frame_bytes = self._body_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keeps a field of a head, and drops one of the trailers."""
        if not self._in_head:
            self._connections.metrics.dropped_trailers.inc()
            return
        if len(self.headers) == self._limits.head_fields:
            self._stop_parsing(f"the request has more than {self._limits.head_fields} headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begins to answer, because the head is whole."""
        super().on_headers_complete()
        self._in_head = False
        self._num_heads += 1
        if self.scope["http_version"] == "1.0":
            # Its task has been created, but has not begun to run.
            self.cycle.__class__ = CycleUntilClose

    def on_body(self, body: bytes) -> None:
        """Counts and keeps bytes of a body."""
        self._piece_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Notes that a body is whole."""
        self._in_message = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Goes on with what came behind the request that has been answered."""
        super().on_response_complete()
        if self.transport.is_closing():
            return self._place.wait()  # only for the client to read the rest
        if self._refusal is not None:
            return self._send_refusal(self._refusal)
        if self._waiting and not self._waits_for_answer:
            data = bytes(self._waiting)
            self._waiting.clear()
            self._parse(data)
            self.flow.resume_reading()
        self._settle()

    def send_400_response(self, msg: str) -> None:
        """Refuses bytes that uvicorn cannot read."""
        self._refuse(self._refusal or InvalidRequest("this is not a request in HTTP/1.1"))

    def pause_writing(self) -> None:
        """Gives the client a time in which it must read something."""
        super().pause_writing()
        if self._write_timer is None:
            seconds = self._limits.write_seconds
            self._write_timer = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Notes that the client reads."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    @property
    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _waits_for_answer(self) -> bool:
        """Returns whether what comes belongs to a request behind the one being answered."""
        is_next = not self._in_message or self._in_head or bool(self.pipeline)
        return self._is_busy and is_next

    def _may_read(self) -> bool:
        return len(self._waiting) <= _MAX_WAITING

    def _parse(self, data: bytes) -> None:
        for start in range(0, len(data), _PIECE):
            if self._refusal is not None or self.transport.is_closing():
                break
            if self._waits_for_answer:
                self._waiting += data[start:]
                break
            piece = data if len(data) <= _PIECE else data[start : start + _PIECE]
            self._num_begun = self._num_heads = self._piece_body_bytes = 0
            was_in_message = self._in_message
            super().data_received(piece)
            if self._refusal is None:
                self._count(len(piece), was_in_message)
        self._settle()

    def _count(self, num_bytes: int, was_in_message: bool) -> None:
        """Counts the bytes of a piece, and refuses the message if they are too many."""
        limits, num_body = self._limits, self._piece_body_bytes
        self._body_bytes += num_body
        if self._in_head and self._num_begun > (not was_in_message):
            self._head_bytes = 0  # the share of the message before is not known
        elif self._in_head or not (was_in_message or self._num_heads):
            self._head_bytes += num_bytes - num_body
        else:
            self._head_bytes = 0
        if was_in_message and not (self._num_begun or self._num_heads):
            self._frame_bytes += num_bytes - num_body
            self._unbroken_frame_bytes += num_bytes
        if num_body:
            self._unbroken_frame_bytes = 0
        if self._head_bytes > limits.head_bytes:
            self._refuse(InvalidRequest(f"the headers have more than {limits.head_bytes:,} bytes"))
        allowed = limits.head_bytes + _FRAME_PER_BYTE * self._body_bytes
        if self._unbroken_frame_bytes > limits.head_bytes or self._frame_bytes > allowed:
            self._refuse(InvalidRequest("the body has too much between its bytes, or behind them"))
        if self._phase is _Phase.REST:
            self._rest_bytes += num_bytes
            if self._rest_bytes > limits.rest_bytes:
                self.transport.close()

    def _settle(self) -> None:
        """Enters the phase that the connection is in now."""
        if self._is_busy:
            self._enter(_Phase.BUSY)
        elif self._in_message and not self._in_head:
            self._enter(_Phase.REST)
        elif self._in_message or self._head_bytes or self.cycle is None:
            self._enter(_Phase.HEAD)
        else:
            self._enter(_Phase.IDLE)

    def _enter(self, phase: _Phase) -> None:
        if phase is self._phase or self.transport.is_closing():
            return
        self._phase = phase
        self._stop_timer()
        if phase is _Phase.BUSY:
            return self._place.work()
        self._place.wait()
        self._rest_bytes = 0
        seconds, end = {
            _Phase.HEAD: (self._limits.head_seconds, self._refuse_slow),
            _Phase.REST: (self._limits.rest_seconds, self.transport.close),
            _Phase.IDLE: (self._limits.keep_alive_seconds, self.transport.close),
        }[phase]
        self._timer = self.loop.call_later(seconds, end)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse_slow(self) -> None:
        if not self._in_message:  # an idle connection: there is no request that could fail
            return self.transport.close()
        seconds = self._limits.head_seconds
        self._refuse(DeadlineExceeded(f"the headers did not arrive in {seconds:g} seconds"))

    def _stop_parsing(self, message: str) -> None:
        """Ends a call of the parser, which turns every exception into an error of its own."""
        self._refusal = InvalidRequest(message)
        raise self._refusal

    def _refuse(self, error: ServingError) -> None:
        """Refuses the current message, when the answer to the one before it is complete."""
        self._refusal = error
        is_in_body = self._in_message and not self._in_head
        if self._is_busy and not is_in_body:
            return  # until `on_response_complete`
        if is_in_body and self.cycle.response_started:
            self.transport.close()
        else:
            self._send_refusal(error)

    def _send_refusal(self, error: ServingError) -> None:
        self._stop_timer()
        if self.transport.is_closing():
            return
        client = self.client[0] if self.client else ""
        log_refusal(error, client, self._connections.metrics)
        self.transport.write(refusal_of(error))
        self.transport.close()


def refusal_of(error: ServingError) -> bytes:
    """Returns the whole answer, head and body, that refuses a connection's request."""
    body = error_body(error).model_dump_json().encode()
    head = (
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        f"x-ms-error-code: {error.azure_code}\r\nconnection: close\r\n"
    )
    if error.retry_after is not None:
        head += f"retry-after: {error.retry_after}\r\n"
    return STATUS_LINE[error.http_status] + head.encode() + b"\r\n" + body
