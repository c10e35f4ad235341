"""Requests to a running gateway, and checks of its answers."""

import json
from collections.abc import Iterator
from typing import Any

import httpx

from serving.errors import LEAVES
from serving.gateway.dialect.anthropic.error import is_anthropic_path
from serving.gateway.dialect.openai import is_openai_path
from tests.support.fakes import KEY, Stack

# What OpenAI's clients are told of a status; all others are invalid_request_error.
OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    **dict.fromkeys((424, 500, 503), "server_error"),
}
# What Anthropic's clients are told of a status; all others are invalid_request_error too.
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
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
    """Checks that an answer keeps the error contract of its path; returns its message.

    Args:
        response: The answer.
        status: The status that it has on Azure's paths; OpenAI's have 400 in the place of 422,
            and Anthropic's 500 in the place of 424.
        code: Azure's code.
    """
    if is_anthropic_path(response.request.url.path):
        return _check_anthropic_error(response, status, code)
    if is_openai_path(response.request.url.path):
        return _check_openai_error(response, status, code)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-ms-error-code"] == code
    assert ("retry-after" in response.headers) == (status in (429, 503))
    answer = response.json()
    inner = answer["error"]
    kind = OPENAI_TYPES.get(status, "invalid_request_error")
    assert inner == {"code": code, "message": answer["message"], "status": status, "type": kind}
    assert (answer["code"], answer["status"]) == (code, status)
    assert isinstance(answer["detail"], list if status == 422 else str)
    return str(inner["message"])


def _check_anthropic_error(response: httpx.Response, status: int, code: str) -> str:
    own = {422: 400, 424: 500}.get(status, status)
    assert response.status_code == own, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-ms-error-code"] == code
    assert ("retry-after" in response.headers) == (status in (429, 503))
    answer = response.json()
    inner = answer["error"]
    assert answer == {
        "type": "error",
        "error": {
            "type": ANTHROPIC_TYPES.get(own, "invalid_request_error"),
            "message": inner["message"],
        },
        "request_id": response.headers["request-id"],
    }
    return str(inner["message"])


def _check_openai_error(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == (400 if status == 422 else status), response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-ms-error-code"] == code
    assert ("retry-after" in response.headers) == (status in (429, 503))
    answer = response.json()
    assert answer.keys() == {"error"}
    inner = answer["error"]
    assert list(inner) == ["message", "type", "param", "code"]
    leaf = {leaf.azure_code: leaf for leaf in LEAVES.values()}[code]
    if status != 422:
        assert inner["code"] == leaf.openai_code
    assert inner["type"] == OPENAI_TYPES.get(status, "invalid_request_error")
    return str(inner["message"])


def address(stack: Stack) -> tuple[str, int]:
    """Returns the host and the port of a running gateway."""
    url = httpx.URL(stack.url)
    assert url.port is not None
    return url.host, url.port
