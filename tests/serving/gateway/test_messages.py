"""Anthropic's Messages API through the gateway."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serving.access.credentials import Access
from serving.access.keyring import Keyring
from serving.accounting.accounts import Accounts
from tests.support.fakes import KEY, PATIENCE, Stack, gateway_config, running_stack
from tests.support.gateway import check_error

PATHS = ("/v1/messages", "/anthropic/v1/messages")


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    headers = {"x-api-key": KEY, "anthropic-version": "2023-06-01", "anthropic-beta": "any"}
    with httpx.Client(base_url=stack.url, headers=headers, timeout=PATIENCE) as client:
        yield client


def body(text: str = "one two", **parameters: Any) -> dict[str, Any]:
    """Returns the body of a request whose only message is the user's `text`."""
    messages = [{"role": "user", "content": text}]
    return {"model": "azureai", "max_tokens": 16, "messages": messages} | parameters


def test_an_answer(stack: Stack, client: httpx.Client) -> None:
    stack.service.cached_tokens = 1
    answer = client.post("/v1/messages", json=body(system="be brief"))
    stack.service.cached_tokens = 0
    assert answer.headers["request-id"] == f"req_{answer.headers['x-request-id']}"
    told = answer.json()
    assert told["id"] == f"msg_{answer.headers['x-request-id']}"
    assert (told["model"], told["stop_reason"]) == ("scripted-7B", "end_turn")
    assert told["usage"] == {
        "input_tokens": 1,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 1,
        "output_tokens": 2,
    }
    (asked,) = stack.service.requests
    assert [message.role for message in asked.chat.messages] == ["system", "user"]
    assert asked.max_tokens == 16


@pytest.mark.parametrize("path", PATHS)
def test_a_key_is_needed(stack: Stack, path: str) -> None:
    with httpx.Client(base_url=stack.url, timeout=PATIENCE) as stranger:
        for headers in ({}, {"x-api-key": "wrong"}):
            answer = stranger.post(path, json=body(), headers=headers)
            assert "x-api-key" in check_error(answer, 401, "Unauthorized")
        for headers in ({"x-api-key": KEY}, {"authorization": f"Bearer {KEY}"}):
            assert stranger.post(path, json=body(), headers=headers).status_code == 200
        for other in (f"{path}/count_tokens", "/anthropic/v1/models"):
            method = "GET" if other.endswith("models") else "POST"
            check_error(stranger.request(method, other), 401, "Unauthorized")
        # The header opens every route.
        assert stranger.get("/v1/models", headers={"x-api-key": KEY}).status_code == 200


@pytest.mark.parametrize(
    ("given", "status", "code", "words"),
    [
        (body(max_tokens=0), 422, "Invalid input", "max_tokens: Input should be greater"),
        (body(wine="red"), 422, "Invalid input", "wine: Extra inputs are not permitted"),
        (body(container="c"), 422, "parameter_not_supported", "container is not supported"),
        (body(model="claude"), 404, "unknown_model", "'claude' does not exist"),
        (body("!long"), 400, "context_length_exceeded", "prompt is too long"),
        (body("!fail:Overloaded"), 429, "TooManyRequests", "was asked for"),
        (body("!fail:EngineFailure"), 424, "ModelError", "was asked for"),
        (body("!fail:Unavailable"), 503, "ServiceUnavailable", "was asked for"),
    ],
)
def test_refusals(
    client: httpx.Client, given: dict[str, Any], status: int, code: str, words: str
) -> None:
    answer = client.post("/v1/messages", json=given)
    assert words in check_error(answer, status, code)
    stream = client.post("/v1/messages", json=given | {"stream": True})
    assert words in check_error(stream, status, code)


def test_refusals_before_the_body_is_read(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The large body may take longer to send than a refused client is read.
    monkeypatch.setattr("serving.gateway.http.body._LINGER_SECONDS", 2 * PATIENCE)
    for path in PATHS:
        check_error(client.get(path), 405, "MethodNotAllowed")
        check_error(client.post(path, content=b"{"), 400, "BadRequest")
        plain = client.post(path, content=b"{}", headers={"content-type": "text/plain"})
        check_error(plain, 415, "UnsupportedMediaType")
        large = client.post(path, content=b" " * (4 * 2**20 + 1))
        check_error(large, 413, "RequestEntityTooLarge")
    check_error(client.post("/v1/messages/batches", json={}), 404, "NotFound")
    check_error(client.get("/anthropic/v1/wine"), 404, "NotFound")


def test_hosted_tools_are_listed_where_they_are_left_out() -> None:
    tools = [{"type": "web_search_20260318", "name": "web_search"}]
    with (
        running_stack(ignore_hosted_tools=True) as stack,
        httpx.Client(base_url=stack.url, headers={"x-api-key": KEY}) as client,
    ):
        answer = client.post("/v1/messages", json=body(tools=tools))
        assert answer.headers["x-mixtral-ignored-tools"] == "web_search_20260318"
        with client.stream("POST", "/v1/messages", json=body(tools=tools, stream=True)) as stream:
            assert stream.headers["x-mixtral-ignored-tools"] == "web_search_20260318"


def test_models_are_listed_in_anthropics_form(stack: Stack, client: httpx.Client) -> None:
    page = client.get("/v1/models?limit=1").json()
    assert (page["first_id"], page["has_more"]) == ("scripted-7B", False)
    assert page["data"] == [client.get("/v1/models/scripted-7B").json()]
    with httpx.Client(base_url=stack.url, headers={"x-api-key": KEY}) as plain:
        assert plain.get("/anthropic/v1/models").json() == page
        assert plain.get("/v1/models").json()["object"] == "list"
        unknown = plain.get("/anthropic/v1/models/other")
        check_error(unknown, 404, "unknown_model")


@pytest.mark.parametrize("path", PATHS)
def test_tokens_are_counted(stack: Stack, client: httpx.Client, path: str) -> None:
    tool = {"name": "f", "input_schema": {"type": "object"}}
    given = {"model": "azureai", "messages": [{"role": "user", "content": "hi"}]}
    stack.service.tokenized.clear()
    asked = given | {"system": "be brief", "tools": [tool], "thinking": {"type": "adaptive"}}
    answer = client.post(f"{path}/count_tokens", json=asked)
    # The scripted service has a token for each byte, and two for each chat.
    assert (answer.status_code, answer.json()) == (200, {"input_tokens": 4})
    ((sent, metadata),) = stack.service.tokenized
    assert [turn.role for turn in sent.chat.messages] == ["system", "user"]
    assert [own.name for own in sent.chat.tools] == ["f"]
    assert metadata["mixtral-caller-bin"] == b"default"  # callers take turns
    assert answer.headers["request-id"].startswith("req_")
    # What is counted may be the very request that will be sent.
    assert client.post(f"{path}/count_tokens", json=asked | body("hi")).status_code == 200
    for wrong, status, code in (
        ({"wine": "red"}, 422, "Invalid input"),
        ({"messages": []}, 422, "Invalid input"),
        ({"messages": [{"role": "user", "content": "!long"}]}, 400, "context_length_exceeded"),
    ):
        check_error(client.post(f"{path}/count_tokens", json=asked | wrong), status, code)


def test_a_count_is_a_request_of_its_callers_minute() -> None:
    access = Access(Keyring({"one": KEY}))
    accounts = Accounts.of(gateway_config(max_requests_per_minute=2))
    with (
        running_stack(access=access, parts={"accounts": accounts}) as stack,
        httpx.Client(base_url=stack.url, headers={"x-api-key": KEY}) as client,
    ):
        counts = [client.post("/v1/messages/count_tokens", json=body()) for _ in range(3)]
    assert [answer.status_code for answer in counts] == [200, 200, 429]
    check_error(counts[2], 429, "TooManyRequests")
    assert counts[0].headers["x-ratelimit-remaining-requests"] == "1"
