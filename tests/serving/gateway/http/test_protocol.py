"""Heads and bodies that are no HTTP, too long or too slow; trailers; requests behind others."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from serving.gateway.http.connections import Connections, Place
from serving.gateway.http.limits import HttpLimits
from serving.gateway.http.metrics import GatewayMetrics
from serving.gateway.http.protocol import Protocol
from tests.support.fakes import KEY, PATIENCE, Stack, running_stack
from tests.support.gateway import address, chat_body

HOST = b"host: x\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


class Wire(asyncio.Transport):
    """A transport whose other end is this test."""

    def __init__(self) -> None:
        super().__init__({"peername": ("192.0.2.1", 1), "sockname": ("192.0.2.2", 2)})
        self.written = b""
        self.is_closed = False
        self.is_reading = True
        self.written_at = self.closed_at = 0.0  # the loop's time, of the last write

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)
        self.written_at = asyncio.get_running_loop().time()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert (high, low) == (0, 0)

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True
        self.closed_at = asyncio.get_running_loop().time()

    abort = close

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True


class Echo:
    """Answers with the body, when the test lets it."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            more = message["more_body"]
        await self.may_answer.wait()
        await PlainTextResponse(body)(scope, receive, send)


class Connection:
    """One connection to an application, without sockets."""

    def __init__(self, app: Any, limits: HttpLimits) -> None:
        self.metrics = GatewayMetrics()
        connections = Connections(limits, self.metrics)
        place = connections.take("192.0.2.1", lambda: None)
        assert place is not None
        self.place: Place = place
        self.connections = connections
        self.wire = Wire()
        config = uvicorn.Config(app, log_config=None, ws="none")
        self.protocol = Protocol(
            config=config,
            server_state=ServerState(),
            app_state={},
            connections=connections,
            place=place,
        )
        self.protocol.connection_made(self.wire)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.001)

    async def send(self, data: bytes) -> None:
        self.protocol.data_received(data)
        await asyncio.sleep(0)

    def send_for_ever(self, data: bytes) -> int:
        """Sends `data` again and again, until the connection is closed; returns bytes sent."""
        sent = 0
        while not self.wire.is_closed and sent < 2**26:
            self.protocol.data_received(data)
            sent += len(data)
        return sent


@asynccontextmanager
async def connected(app: Any, **limits: Any) -> AsyncIterator[Connection]:
    connection = Connection(app, HttpLimits(**limits))
    yield connection
    connection.protocol.connection_lost(None)
    assert len(connection.connections) == 0


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await test()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("begin", "endless"),
    [
        (CHUNKED + b"0\r\n", b"x: y\r\n" * 1000),  # trailers
        (CHUNKED + b"0\r\nx: ", b"y" * 65536),  # a trailer without end
        (CHUNKED + b"1;", b"x" * 1000),  # an extension of a chunk
        (CHUNKED, b"1;" + b"x" * 1000 + b"\r\ny\r\n"),  # extensions of many chunks
        (b"", b"\r\n" * 1000),  # empty lines before a request
        (b"GET / HTTP/1.1\r\nx: ", b"y" * 4096),  # a header
        (b"GET /", b"y" * 4096),  # a path
        (b"GET / HTTP/1.1\r\n", b"x: y\r\n"),  # headers
    ],
)
def test_what_has_no_end_is_read_for_64_kib(begin: bytes, endless: bytes) -> None:
    async def test() -> None:
        async with connected(Echo()) as connection:
            await connection.send(begin)
            sent = connection.send_for_ever(endless)
            # A byte of a body may be framed by eight, and a piece of 4 KiB is checked at its end.
            assert sent <= 2**16 + len(endless) + 4096 + sent // 9
            assert connection.wire.written.startswith(b"HTTP/1.1 400 ")

    run(test)


def test_trailers_are_dropped_and_counted() -> None:
    async def test() -> None:
        async with connected(app := Echo()) as connection:
            await connection.send(
                CHUNKED + b"2\r\nhi\r\n0\r\nauthorization: Bearer x\r\na: b\r\n\r\n"
            )
            await connection.until(lambda: connection.wire.written.endswith(b"hi"))
            assert [name for name, _ in app.scopes[0]["headers"]] == [b"host", b"transfer-encoding"]
            counted = connection.metrics.registry.get_sample_value
            assert counted("mixtral_gateway_dropped_trailers_total") == 2

    run(test)


def test_a_body_of_small_chunks_is_read() -> None:
    async def test() -> None:
        async with connected(Echo()) as connection:
            await connection.send(CHUNKED)
            for _ in range(50):
                await connection.send(b"1\r\nx\r\n" * 1000)
            await connection.send(b"0\r\n\r\n")
            await connection.until(lambda: connection.wire.written.endswith(b"x" * 50_000))

    run(test)


def test_requests_behind_others_are_answered_in_turn() -> None:
    """Each body is longer than a head may be, and reads end anywhere."""
    bodies = [letter * 70_000 for letter in (b"a", b"b", b"c")]
    head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 70000\r\n\r\n"
    sent = b"".join(head + body for body in bodies)

    async def test(size: int) -> None:
        async with connected(app := Echo()) as connection:
            app.may_answer.clear()
            for start in range(0, len(sent), size):
                await connection.send(sent[start : start + size])
                assert len(app.scopes) <= 1  # what is behind is not parsed yet
            app.may_answer.set()
            await connection.until(lambda: connection.wire.written.endswith(bodies[-1]))
            answers = connection.wire.written.split(b"HTTP/1.1 200 OK\r\n")[1:]
            assert [answer.partition(b"\r\n\r\n")[2] for answer in answers] == bodies
            assert connection.wire.is_reading

    for size in (1 << 18, 10_007):
        asyncio.run(test(size))


def test_reading_stops_where_much_waits_behind_a_request() -> None:
    async def test() -> None:
        async with connected(app := Echo()) as connection:
            app.may_answer.clear()
            request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
            await connection.send(request * 10_000)
            assert not connection.wire.is_reading
            assert len(app.scopes) <= 4096 // len(request) + 1

    run(test)


def test_a_wrong_request_behind_another_waits_for_its_answer() -> None:
    async def test() -> None:
        async with connected(app := Echo()) as connection:
            app.may_answer.clear()
            await connection.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\nnonsense\r\n\r\n")
            assert connection.wire.written == b""
            app.may_answer.set()
            await connection.until(lambda: connection.wire.is_closed)
            statuses = [part[:3] for part in connection.wire.written.split(b"HTTP/1.1 ")[1:]]
            assert statuses == [b"200", b"400"]

    run(test)


def test_much_behind_a_wrong_request_does_not_end_the_answer_before() -> None:
    async def test() -> None:
        async with connected(app := Echo(), head_seconds=0.02) as connection:
            app.may_answer.clear()
            await connection.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" + b"nonsense\r\n" * 1000)
            await asyncio.sleep(0.05)
            assert not connection.wire.is_closed
            app.may_answer.set()
            await connection.until(lambda: connection.wire.is_closed)
            assert connection.wire.written.startswith(b"HTTP/1.1 200 ")

    run(test)


def test_a_wrong_body_is_refused_before_its_answer_begins() -> None:
    async def test() -> None:
        async with connected(Echo()) as connection:
            await connection.send(CHUNKED + b"2\r\nhi\r\n")
            await connection.send(b"nonsense\r\n")
            assert connection.wire.written.startswith(b"HTTP/1.1 400 ")
            assert connection.wire.is_closed

    run(test)


def test_headers_have_a_number() -> None:
    async def test(number: int, status: bytes) -> None:
        async with connected(Echo()) as connection:
            await connection.send(
                b"GET / HTTP/1.1\r\n" + HOST + b"x: y\r\n" * (number - 1) + b"\r\n"
            )
            await connection.until(lambda: connection.wire.written != b"")
            assert connection.wire.written.split(b" ")[1] == status

    for number, status in ((256, b"200"), (257, b"400")):
        asyncio.run(test(number, status))


async def refuse_unread(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("no", 401)(scope, receive, send)


def test_the_rest_of_a_refused_body_has_a_time_and_a_size() -> None:
    head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n"

    async def test_time() -> None:
        async with connected(refuse_unread, rest_seconds=0.05) as connection:
            await connection.send(head)
            await connection.until(lambda: connection.wire.written.endswith(b"no"))
            await connection.until(lambda: connection.wire.is_closed)
            wire = connection.wire
            assert wire.closed_at - wire.written_at > 0.049  # all of rest_seconds but rounding

    async def test_size() -> None:
        async with connected(refuse_unread, rest_bytes=1_000_000) as connection:
            await connection.send(head)
            await connection.until(lambda: connection.wire.written.endswith(b"no"))
            assert connection.send_for_ever(b"x" * 10_000) <= 1_010_000

    run(test_time)
    run(test_size)


def test_a_body_that_ends_later_leaves_the_connection_usable() -> None:
    async def test() -> None:
        async with connected(refuse_unread) as connection:
            await connection.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n")
            await connection.until(lambda: connection.wire.written.endswith(b"no"))
            await connection.send(b"x" * 100_000)
            await connection.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            await connection.until(lambda: connection.wire.written.count(b"HTTP/1.1 401") == 2)

    run(test)


def test_an_idle_connection_ends() -> None:
    """Empty lines, which a parser skips, do not keep it alive."""

    async def test(first: bytes, then: bytes, **limits: float) -> None:
        async with connected(Echo(), **limits) as connection:
            if first:
                await connection.send(first)
                await connection.until(lambda: connection.wire.written != b"")
            before = connection.wire.written
            await connection.send(then)
            await connection.until(lambda: connection.wire.is_closed)
            assert connection.wire.written == before

    request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    asyncio.run(test(b"", b"", head_seconds=0.02))
    asyncio.run(test(b"", b"\r\n", head_seconds=0.02))
    asyncio.run(test(request, b"", keep_alive_seconds=0.02))
    asyncio.run(test(request, b"\r\n", head_seconds=0.02))


def test_a_client_that_reads_nothing_is_cut_off() -> None:
    async def test() -> None:
        async with connected(Echo(), write_seconds=0.02) as connection:
            connection.protocol.pause_writing()
            connection.protocol.resume_writing()
            await asyncio.sleep(0.04)
            assert not connection.wire.is_closed
            connection.protocol.pause_writing()
            await connection.until(lambda: connection.wire.is_closed)

    run(test)


def test_a_key_in_a_trailer_opens_nothing(stack: Stack) -> None:
    body = json.dumps(chat_body("one")).encode()
    sent = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    sent += b"transfer-encoding: chunked\r\ntrailer: authorization\r\n\r\n"
    sent += b"%x\r\n%s\r\n0\r\nauthorization: Bearer %s\r\n\r\n" % (len(body), body, KEY.encode())
    with socket.create_connection(address(stack), timeout=PATIENCE) as connection:
        connection.sendall(sent)
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 401 ")


def test_a_head_that_does_not_come_is_not_waited_for() -> None:
    def answer_to(sent: bytes) -> bytes:
        with socket.create_connection(address(stack), timeout=PATIENCE) as connection:
            connection.sendall(sent)
            return connection.makefile("rb").read()

    with running_stack(http=HttpLimits(head_seconds=0.05)) as stack:
        assert answer_to(b"") == b""
        answer, deadline = b"", time.monotonic() + PATIENCE
        # On a busy machine the connection may end before this head has begun.
        while not answer and time.monotonic() < deadline:
            with suppress(ConnectionError):
                answer = answer_to(b"GET /info HTTP/1.1\r\nx: ")
        assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "sent",
    [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"a" * 70_000, b"GET /\xff HTTP/1.1\r\n\r\n"],
)
def test_what_is_no_http_is_told_so(stack: Stack, sent: bytes) -> None:
    with socket.create_connection(address(stack), timeout=PATIENCE) as connection:
        connection.sendall(sent)
        head, _, told = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert json.loads(told)["error"]["code"] == "BadRequest"


def ask(stack: Stack, version: str, **parameters: object) -> tuple[bytes, bytes]:
    """Returns the head and the body of a chat's answer; the connection ends behind it."""
    sent = json.dumps(chat_body("one two", **parameters)).encode()
    head = f"POST /v1/chat/completions HTTP/{version}\r\nauthorization: Bearer {KEY}\r\nhost: x\r\n"
    head += f"connection: close\r\ncontent-length: {len(sent)}\r\n\r\n"
    with socket.create_connection(address(stack), timeout=PATIENCE) as connection:
        connection.sendall(head.encode() + sent)
        answer_head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    return answer_head.lower(), body


def test_a_stream_to_http_1_0_has_no_chunks_and_ends_with_the_connection(stack: Stack) -> None:
    head, body = ask(stack, "1.0", stream=True)
    assert b"transfer-encoding" not in head
    assert head.count(b"connection: close") == 1
    assert b"content-type: text/event-stream" in head and b"x-request-id: " in head
    assert body.startswith(b"data: {") and body.endswith(b"\n\ndata: [DONE]\n\n")
    assert all(event.startswith(b"data: ") for event in body.split(b"\n\n")[:-1])
    head, _ = ask(stack, "1.1", stream=True)
    assert b"transfer-encoding: chunked" in head


def test_an_answer_at_once_to_http_1_0_has_a_length(stack: Stack) -> None:
    head, body = ask(stack, "1.0")
    assert b"transfer-encoding" not in head
    assert f"content-length: {len(body)}".encode() in head
    assert json.loads(body)["choices"][0]["message"]["content"] == "one two"


def test_a_stream_to_http_1_0_that_fails_says_so_and_has_no_end(stack: Stack) -> None:
    sent = {"messages": [{"role": "user", "content": "one !fail:EngineFailure"}], "stream": True}
    head, body = ask(stack, "1.0", **sent)
    assert head.startswith(b"http/1.1 200 ")
    assert b'"code":"model_error"' in body and b"[DONE]" not in body
