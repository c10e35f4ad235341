"""Connections as they are accepted: limits, handshakes, addresses behind a proxy."""

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from serving.gateway.http.connections import Connections, Place
from serving.gateway.http.drain import Drain
from serving.gateway.http.limits import HttpLimits
from serving.gateway.http.metrics import GatewayMetrics
from serving.gateway.http.server import HttpServer
from tests.support.fakes import PATIENCE
from tests.support.identity import certificate

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Doorkeeper:
    """Answers with the client's address, and keeps clients that ask for /wait waiting."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.num_waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/wait":
            self.num_waiting += 1
            await self.released.wait()
        if scope["path"] == "/long":
            return await PlainTextResponse("x" * 2**24)(scope, receive, send)
        await PlainTextResponse(scope["client"][0])(scope, receive, send)


class Door:
    """A running server."""

    def __init__(self, port: int, app: Doorkeeper, metrics: GatewayMetrics) -> None:
        self.port = port
        self.app = app
        self.metrics = metrics
        self._writers: list[asyncio.StreamWriter] = []

    def close(self) -> None:
        """Closes the clients' ends."""
        for writer in self._writers:
            writer.transport.abort()

    async def open(self, sent: bytes = b"", **tls: Any) -> Pair:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, **tls)
        writer.write(sent)
        self._writers.append(writer)
        return reader, writer

    def refused(self, reason: str) -> float | None:
        name = "mixtral_gateway_refused_connections_total"
        return self.metrics.registry.get_sample_value(name, {"reason": reason})


@asynccontextmanager
async def running(
    proxies: tuple[str, ...] = (), cert: Path | None = None, **limits: Any
) -> AsyncIterator[Door]:
    app, metrics = Doorkeeper(), GatewayMetrics()
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",
        lifespan="off",
        ws="none",
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
        timeout_graceful_shutdown=1,
        ssl_certfile=cert,
    )
    connections = Connections(HttpLimits(**limits), metrics)
    server = HttpServer(config, Drain(app, app, 0.0), listener, connections)
    port = listener.getsockname()[1]
    async with asyncio.timeout(PATIENCE):
        serving = asyncio.create_task(server.serve())
        door = Door(port, app, metrics)
        try:
            yield door
        finally:
            door.close()
            app.released.set()
            server.should_exit = True
            await serving


async def status(pair: Pair) -> int:
    head = await pair[0].readuntil(b"\r\n\r\n")
    return int(head.split()[1])


async def is_closed(pair: Pair) -> bool:
    try:
        return await pair[0].read(1) == b""
    except ConnectionError:
        return True


def test_idle_sockets_keep_nobody_out() -> None:
    async def test() -> None:
        async with running(max_connections=20) as door:
            idle = [await door.open() for _ in range(100)]
            partial = [await door.open(b"GET / HTTP/1.1\r\nx: ") for _ in range(100)]
            assert await status(await door.open(REQUEST)) == 200
            assert await is_closed(idle[0]) and await is_closed(partial[0])

    asyncio.run(test())


def test_a_kept_connection_is_idle() -> None:
    async def test() -> None:
        async with running(max_connections=1) as door:
            kept = await door.open(REQUEST)
            assert await status(kept) == 200
            assert await kept[0].readexactly(9) == b"127.0.0.1"
            kept[1].write(REQUEST)
            assert await status(kept) == 200
            assert await kept[0].readexactly(9) == b"127.0.0.1"
            assert await status(await door.open(REQUEST)) == 200
            assert await is_closed(kept)

    asyncio.run(test())


def test_where_all_are_busy_a_new_one_is_told_to_come_again() -> None:
    async def test() -> None:
        async with running(max_connections=2) as door:
            busy = [await door.open(REQUEST.replace(b"/ ", b"/wait ")) for _ in range(2)]
            while door.app.num_waiting < 2:
                await asyncio.sleep(0.001)
            refused = await door.open()
            head, body = (await refused[0].read()).split(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ") and b"\r\nretry-after: 2" in head
            assert json.loads(body)["error"]["code"] == "ServiceUnavailable"
            assert door.refused("total") == 1
            door.app.released.set()
            assert [await status(pair) for pair in busy] == [200, 200]

    asyncio.run(test())


def test_a_handshake_that_does_not_end_is_not_waited_for(tmp_path: Path) -> None:
    pem = certificate(tmp_path)

    async def test() -> None:
        async with running(cert=pem, max_connections=5, head_seconds=0.2) as door:
            silent = [await door.open() for _ in range(10)]
            client = ssl.create_default_context(cafile=str(pem))

            async def is_answered() -> bool:
                try:
                    return await status(await door.open(REQUEST, ssl=client)) == 200
                except (OSError, EOFError):  # its own handshake was too slow
                    return False

            while not await is_answered():
                await asyncio.sleep(0.01)
            assert not door.refused("total")  # it has never been kept out
            assert all([await is_closed(pair) for pair in silent])
            assert await is_closed(await door.open(b"GET / HTTP/1.1\r\n\r\n"))  # no TLS
            assert (door.refused("handshake") or 0) >= 5

    asyncio.run(test())


@pytest.mark.parametrize("is_tls", [False, True])
def test_a_client_that_does_not_read_its_answer_is_cut_off(tmp_path: Path, is_tls: bool) -> None:
    pem = certificate(tmp_path) if is_tls else None
    request = b"GET /long HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"

    async def test() -> None:
        async with running(cert=pem, write_seconds=0.1) as door:
            client = ssl.create_default_context(cafile=str(pem)) if is_tls else None
            silent = await door.open(request, limit=1024, ssl=client)
            assert await status(silent) == 200
            opened = "mixtral_gateway_open_connections"
            while door.metrics.registry.get_sample_value(opened):
                await asyncio.sleep(0.01)

    asyncio.run(test())


def test_the_address_behind_a_trusted_proxy_is_taken() -> None:
    async def test(proxies: tuple[str, ...], address: bytes) -> None:
        async with running(proxies) as door:
            forwarded = b"x-forwarded-for: 203.0.113.9\r\n\r\n"
            reader, _ = await door.open(REQUEST[:-2] + forwarded)
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.read(20) == address

    asyncio.run(test((), b"127.0.0.1"))
    asyncio.run(test(("192.0.2.1",), b"127.0.0.1"))
    asyncio.run(test(("127.0.0.0/8",), b"203.0.113.9"))


def test_a_fault_with_one_connection_keeps_no_other_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Connections.take

    def faulty(self: Connections, address: str, end: Callable[[], None]) -> Place | None:
        monkeypatch.setattr(Connections, "take", take)
        raise ValueError("a fault")

    monkeypatch.setattr(Connections, "take", faulty)

    async def test() -> None:
        async with running() as door:
            assert await is_closed(await door.open())
            assert await status(await door.open(REQUEST)) == 200

    asyncio.run(test())
    assert [record.message for record in caplog.records] == ["a connection could not be taken"]
