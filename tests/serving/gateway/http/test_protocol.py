"""Heads that are no HTTP, too long or too slow."""

import json
import socket

import pytest

from serving.gateway.http.protocol import Protocol
from tests.support.fakes import PATIENCE, Stack, running_stack
from tests.support.gateway import address


def test_a_head_that_does_not_come_is_not_waited_for() -> None:
    class Impatient(Protocol):
        head_seconds = 0.05

    with running_stack(protocol=Impatient) as stack:
        for sent, status in ((b"GET /info HTTP/1.1\r\nx: ", b"HTTP/1.1 408 "), (b"", b"")):
            with socket.create_connection(address(stack), timeout=PATIENCE) as connection:
                connection.sendall(sent)
                answer = connection.makefile("rb").read()
            assert answer[:13] == status


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
