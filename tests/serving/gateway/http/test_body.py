"""Bodies that are too large or too slow."""

import asyncio
import json
import socket

import httpx
import pytest
from starlette.types import Message

from serving.gateway.answering import Limits
from serving.gateway.http import body
from serving.gateway.http.body import Lingering
from tests.support.fakes import KEY, PATIENCE, Stack, running_stack
from tests.support.gateway import BEARER, address


def test_a_body_that_is_too_large_is_not_read(stack: Stack) -> None:
    head = f"POST /chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    for framing in (f"content-length: {2**40}", "transfer-encoding: chunked"):
        with socket.create_connection(address(stack), timeout=PATIENCE) as connection:
            connection.sendall(f"{head}{framing}\r\n\r\n".encode())
            if "chunked" in framing:
                half = b"200000\r\n" + b" " * 2**21 + b"\r\n"
                connection.sendall(half + half + b"1\r\n \r\n")
            answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b'"code":"RequestEntityTooLarge"' in answer


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    head = f"POST /chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    with (
        running_stack(limits=Limits(body_seconds=0.05)) as stack,
        socket.create_connection(address(stack), timeout=PATIENCE) as connection,
    ):
        connection.sendall(f"{head}content-length: 10\r\n\r\n{{".encode())
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nconnection: close\r\n" in answer
    assert b'"code":"RequestTimeout"' in answer


def test_a_refused_client_that_goes_on_is_read_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is that of all it sends: a byte now and then does not prolong it."""
    monkeypatch.setattr(body, "_LINGER_SECONDS", 0.1)
    sent: list[Message] = []

    async def receive() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    async def test() -> None:
        async with asyncio.timeout(PATIENCE):
            await Lingering({"a": 1}, 413)({"type": "http"}, receive, send)

    asyncio.run(test())
    assert [message.get("more_body") for message in sent] == [None, True, False]


def test_large_bodies_wait_for_room_and_small_ones_do_not(stack: Stack) -> None:
    """Three bodies of 4 MiB whose last byte never comes: of the third, the most is not read."""
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    most = body.LIMIT - 1
    links = []
    try:
        for _ in range(3):
            link = socket.create_connection(address(stack), timeout=PATIENCE)
            links.append(link)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
            link.sendall(f"{head}content-length: {body.LIMIT}\r\n\r\n".encode())
            if len(links) <= 2:
                link.sendall(b" " * most)
        link.settimeout(0.3)
        with pytest.raises(TimeoutError):
            link.sendall(b" " * most)
        small = json.dumps({"prompt": "one", "max_tokens": 1})
        answer = httpx.post(
            f"{stack.url}/v1/completions", content=small, headers=BEARER, timeout=PATIENCE
        )
        assert answer.status_code == 200
    finally:
        for link in links:
            link.close()
