"""Heads that are no HTTP, too long or too slow."""

import json
import socket

import pytest

from serving.gateway.http.limits import HttpLimits
from tests.support.fakes import KEY, PATIENCE, Stack, running_stack
from tests.support.gateway import address, chat_body


def test_a_head_that_does_not_come_is_not_waited_for() -> None:
    with running_stack(http=HttpLimits(head_seconds=0.05)) as stack:
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
    assert b'"code":"ModelError"' in body and b"[DONE]" not in body
