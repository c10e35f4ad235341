"""Requests to a running gateway, and checks of its answers."""

import json
from collections.abc import Iterator
from typing import Any

import httpx

from tests.support.fakes import KEY, Stack

BEARER = {"authorization": f"Bearer {KEY}"}


def chat_body(text: str, **parameters: Any) -> dict[str, Any]:
    """Returns the body of a chat whose only message is the user's `text`."""
    return {"messages": [{"role": "user", "content": text}]} | parameters


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yields the events of a stream's lines, all but the last one, [DONE]."""
    for line in lines:
        if line and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def check_error(response: httpx.Response, status: int, code: str) -> str:
    """Checks that an answer keeps the error contract; returns its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-ms-error-code"] == code
    assert ("retry-after" in response.headers) == (status in (429, 503))
    answer = response.json()
    inner = answer["error"]
    assert inner == {"code": code, "message": answer["message"], "status": status}
    assert (answer["code"], answer["status"]) == (code, status)
    assert isinstance(answer["detail"], list if status == 422 else str)
    return str(inner["message"])


def address(stack: Stack) -> tuple[str, int]:
    """Returns the host and the port of a running gateway."""
    url = httpx.URL(stack.url)
    assert url.port is not None
    return url.host, url.port
