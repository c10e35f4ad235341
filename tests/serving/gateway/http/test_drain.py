"""The gateway's end: what is under way finishes, and who comes late is told so."""

import asyncio
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from serving.gateway.http.drain import Drain, DrainingServer

PATIENCE = 20.0


class Speaker:
    """Says "one" and, when it is released, "two"."""

    def __init__(self) -> None:
        self.released = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await StreamingResponse(self._words())(scope, receive, send)

    async def _words(self) -> AsyncIterator[bytes]:
        yield b"one"
        while not self.released.is_set():
            await asyncio.sleep(0.01)
        yield b"two"


@contextmanager
def running(speaker: Speaker, seconds: float) -> Iterator[tuple[str, DrainingServer, Drain]]:
    drain = Drain(speaker, PlainTextResponse("later", 503), seconds)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        drain, log_config=None, log_level="error", lifespan="off", timeout_graceful_shutdown=1
    )
    server = DrainingServer(config, drain)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", server, drain
    thread.join(PATIENCE)
    assert not thread.is_alive()  # it has ended by itself


def test_answers_finish_and_late_requests_are_refused() -> None:
    speaker = Speaker()
    with (
        running(speaker, PATIENCE) as (url, server, drain),
        httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as client,
        client.stream("GET", "/") as answer,
    ):
        words = answer.iter_raw()
        assert next(words) == b"one"
        server.handle_exit(signal.SIGTERM, None)
        assert drain.has_begun and not drain.is_over
        late = client.get("/")
        assert (late.status_code, late.text) == (503, "later")
        # It begins before the first answer may end, because the port closes with the last one.
        with client.stream("GET", "/health/live") as live:
            assert live.status_code == 200  # the speaker's, not a refusal
            speaker.released.set()
            assert b"".join(words) == b"two"


def test_it_does_not_wait_for_ever() -> None:
    speaker = Speaker()
    with (
        running(speaker, 0.0) as (url, server, drain),
        httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as client,
        client.stream("GET", "/") as answer,
    ):
        assert next(answer.iter_raw()) == b"one"
        server.handle_exit(signal.SIGTERM, None)
        assert drain.is_over
        speaker.released.set()


def test_a_second_signal_ends_at_once() -> None:
    speaker = Speaker()
    with running(speaker, PATIENCE) as (_, server, _):
        server.handle_exit(signal.SIGTERM, None)
        assert not server.should_exit
        server.handle_exit(signal.SIGTERM, None)
        assert server.should_exit


def test_during_the_delay_only_readiness_fails() -> None:
    """Signal at 100 s, delay of 5 s, 30 s for answers: refusals from 105 s, the end at 135 s."""
    now = 100.0
    drain = Drain(
        PlainTextResponse("served"), PlainTextResponse("later", 503), 30.0, 5.0, lambda: now
    )

    async def statuses() -> list[int]:
        transport = httpx.ASGITransport(drain)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            paths = ("/health/ready", "/health", "/ping", "/health/live", "/v1/models")
            return [(await client.get(path)).status_code for path in paths]

    assert asyncio.run(statuses()) == [200] * 5
    drain.begin()
    assert asyncio.run(statuses()) == [503, 503, 503, 200, 200]
    assert drain.has_begun and not drain.is_over  # although nothing is under way
    now = 104.9
    assert asyncio.run(statuses()) == [503, 503, 503, 200, 200]
    now = 105.0
    assert asyncio.run(statuses()) == [503, 503, 503, 200, 503]
    assert drain.is_over


def test_the_delay_does_not_take_from_the_time_of_answers() -> None:
    now = 100.0
    speaker = Speaker()
    drain = Drain(speaker, PlainTextResponse("later", 503), 30.0, 5.0, lambda: now)

    async def run() -> list[bool]:
        nonlocal now
        transport = httpx.ASGITransport(drain)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            asked = asyncio.create_task(client.get("/"))
            await asyncio.sleep(0.05)
            drain.begin()
            ends = []
            for moment in (100.0, 105.0, 135.0, 135.1):
                now = moment
                ends.append(drain.is_over)
            speaker.released.set()
            assert (await asked).text == "onetwo"
            return ends

    assert asyncio.run(run()) == [False, False, False, True]
