"""The routes over real sockets: paths, bodies that each of them takes or refuses, keys."""

import json
import socket
import time
from typing import Any

import httpx
import pytest

from serving.gateway.routes import MODEL_PATHS, OPENAI_PREFIXES, PREFIXES, RESPONSES_PREFIXES
from tests.support.fakes import KEY, PATIENCE, Stack, running_stack
from tests.support.gateway import BEARER, chat_body, check_error

TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("path", "headers", "content", "status", "code"),
    [
        ("/chat/completions", {}, b"", 400, "BadRequest"),
        ("/chat/completions", {}, b"{", 400, "BadRequest"),
        ("/chat/completions", {}, b"[]", 400, "BadRequest"),
        ("/chat/completions", {}, b"[" * 10_000, 400, "BadRequest"),
        ("/chat/completions", {}, b"{}", 422, "Invalid input"),
        ("/v1/chat/completions", {}, b'{"messages": []}', 422, "Invalid input"),
        ("/chat/completions", {}, b'{"temperature": 1e999}', 422, "Invalid input"),
        ("/chat/completions", {}, b'{"seed": 1' + b"0" * 5000 + b"}", 400, "BadRequest"),
        ("/chat/completions", {}, {"wine": "red"}, 400, "BadRequest"),
        ("/chat/completions", {}, {"logprobs": True}, 400, "BadRequest"),
        ("/chat/completions", {"extra-parameters": "perhaps"}, {}, 400, "BadRequest"),
        ("/chat/completions", {"extra-parameters": "drop"}, {"wine": 1, "n": 2}, 200, ""),
        ("/chat/completions", {"extra-params": "drop"}, {"wine": 1}, 200, ""),
        (
            "/chat/completions",
            {"extra-parameters": "pass-through"},
            {"wine": 1},
            422,
            "Invalid input",
        ),
        (
            "/chat/completions",
            {"extra-params": "pass-through"},
            {"logprobs": True, "ignore_eos": True},
            200,
            "",
        ),
        (
            "/chat/completions",
            {"extra-params": "pass-through"},
            {"structural_tag": {}},
            422,
            "parameter_not_supported",
        ),
        ("/models/chat/completions", {}, {"safe_prompt": True, "random_seed": 1}, 200, ""),
        ("/models/chat/completions", {}, {"n": 2}, 400, "BadRequest"),
        ("/openai/v1/chat/completions", {}, {"n": 2}, 200, ""),
        ("/openai/deployments/azureai/chat/completions", {}, {"n": 2, "user": "u"}, 200, ""),
        ("/chat/completions", {"content-type": "application/json; charset=utf-8"}, {}, 200, ""),
        ("/chat/completions", {"content-type": "text/plain"}, {}, 415, "UnsupportedMediaType"),
        (
            "/chat/completions",
            {"content-type": "application/x-www-form-urlencoded"},
            {},
            415,
            "UnsupportedMediaType",
        ),
        ("/v1/completions", {"content-encoding": "gzip"}, {}, 415, "UnsupportedMediaType"),
        ("/chat/completions?api-version=2024-05-01-preview", {}, {}, 200, ""),
        ("/chat/completions?api-version=2024-06-01", {}, {}, 200, ""),
        ("/openai/deployments/azureai/chat/completions?api-version=v1", {}, {}, 200, ""),
        ("/chat/completions?api-version=soon", {}, {}, 400, "BadRequest"),
        ("/chat/completions?api-version=", {}, {}, 400, "BadRequest"),
        ("/usage?all=perhaps", {}, b"", 405, "MethodNotAllowed"),
        ("/chat/completions", {}, {"ignore_eos": True}, 400, "BadRequest"),
        ("/v1/chat/completions", {}, {"wine": 1}, 200, ""),
        ("/v1/chat/completions", {"extra-parameters": "perhaps"}, {}, 200, ""),
        ("/v1/chat/completions", {}, {"n": 2}, 200, ""),
        ("/v1/chat/completions", {}, {"n": 0}, 422, "Invalid input"),
        ("/v1/chat/completions", {}, {"top_logprobs": 2}, 422, "Invalid input"),
        ("/v1/chat/completions", {}, {"safe_prompt": True}, 200, ""),
        ("/v1/completions", {}, {"echo": True}, 422, "Invalid input"),
        ("/v1/completions", {}, b"[]", 400, "BadRequest"),
        ("/chat/completions", {}, {"tools": [{}]}, 422, "Invalid input"),
        ("/chat/completions", {}, {"tools": [{"type": "web_search"}]}, 422, "Invalid input"),
        ("/chat/completions", {}, {"tools": [TOOL], "tool_choice": "required"}, 200, ""),
        ("/chat/completions", {}, {"parallel_tool_calls": False}, 400, "BadRequest"),
        ("/v1/chat/completions", {}, {"parallel_tool_calls": False}, 200, ""),
        ("/chat/completions", {}, {"response_format": {"type": "json_object"}}, 200, ""),
        (
            "/chat/completions",
            {},
            {"response_format": {"type": "structural_tag"}},
            422,
            "parameter_not_supported",
        ),
    ],
)
def test_bodies(
    client: httpx.Client,
    path: str,
    headers: dict[str, str],
    content: bytes | dict[str, Any],
    status: int,
    code: str,
) -> None:
    if isinstance(content, dict):
        content = json.dumps(chat_body("hello") | content).encode()
    response = client.post(path, headers=headers, content=content)
    if status == 200:
        assert response.status_code == 200, response.text
    else:
        check_error(response, status, code)


def test_the_sentence_that_litellm_reads(client: httpx.Client) -> None:
    response = client.post("/chat/completions", json=chat_body("hello", wine="red", n=2))
    sentence = check_error(response, 400, "BadRequest")
    assert response.json()["detail"] == sentence
    assert "Set extra-parameters to 'pass-through'" in response.text
    listed = response.text[response.text.index("[") :]
    assert listed.startswith("['wine', 'n']")


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "words"),
    [
        ("POST", "/embeddings", 404, "NotFound", "not found"),
        ("POST", "/images/embeddings", 404, "NotFound", "Modality not supported"),
        ("POST", "/models/embeddings", 404, "NotFound", "Modality not supported"),
        ("POST", "/v1/embeddings", 404, "NotFound", "Modality not supported"),
        ("GET", "/v1/models/another", 404, "unknown_model", "does not exist"),
        ("GET", "/v1/models/org/a", 404, "unknown_model", "this endpoint serves 'scripted-7B'"),
        ("GET", "/usage?all=perhaps", 422, "Invalid input", "boolean"),
        ("GET", "/page/", 404, "NotFound", "not found"),
        ("POST", "/", 405, "MethodNotAllowed", "not allowed"),
        ("GET", "/info/", 404, "NotFound", "not found"),
        ("GET", "/chat/completions", 405, "MethodNotAllowed", "not allowed"),
        ("POST", "/info", 405, "MethodNotAllowed", "not allowed"),
    ],
)
def test_routes_that_are_not_there(
    client: httpx.Client, method: str, path: str, status: int, code: str, words: str
) -> None:
    response = client.request(method, path)
    assert words in check_error(response, status, code)
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(
    "path",
    [
        *(f"{prefix}/chat/completions" for prefix in PREFIXES),
        *(f"{prefix}/completions" for prefix in ("", *OPENAI_PREFIXES)),
        *(f"{prefix}/responses" for prefix in RESPONSES_PREFIXES),
        *(f"{prefix}/embeddings" for prefix in OPENAI_PREFIXES),
        *(path for path in MODEL_PATHS if not path.startswith("/anthropic")),
    ],
)
def test_a_refusal_of_a_key_has_openais_type(stack: Stack, path: str) -> None:
    """Wherever a client of OpenAI's may ask, and also where Azure's and llama.cpp's ask."""
    method = "GET" if path in MODEL_PATHS else "POST"
    url = stack.url + path.format(name="scripted-7B")
    response = httpx.request(method, url, json={}, trust_env=False)
    assert response.status_code == 401
    error = response.json()["error"]
    assert error["type"] == "authentication_error"
    is_openai = path.startswith(("/v1/", "/openai/")) or path == "/responses"
    assert error["code"] == ("invalid_api_key" if is_openai else "Unauthorized")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/chat/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/openai/deployments/scripted-7B/chat/completions?api-version=2024-06-01"),
        ("GET", "/info"),
        ("GET", "/v1/models"),
        ("GET", "/usage"),
    ],
)
def test_a_key_is_needed(stack: Stack, method: str, path: str) -> None:
    with httpx.Client(base_url=stack.url, timeout=PATIENCE) as stranger:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"api-key": "wrong"}):
            response = stranger.request(method, path, headers=headers, json=chat_body("hello"))
            assert "auth token validation failed" in check_error(response, 401, "Unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        for headers in ({"authorization": KEY}, {"api-key": KEY}):
            response = stranger.request(method, path, headers=headers, json=chat_body("hello"))
            assert response.status_code == 200
    assert len(stack.service.requests) == (2 if method == "POST" else 0)


@pytest.mark.parametrize("path", ["/v1/models", "/openai/v1/models", "/openai/models", "/models"])
def test_the_list_of_models(client: httpx.Client, path: str) -> None:
    (card,) = client.get(path).json()["data"]
    assert card["id"] == "scripted-7B"
    assert (card["object"], card["owned_by"], card["type"]) == ("model", "Nobody", "base")
    assert card["max_model_len"] == 64
    assert card["capabilities"]["completion_chat"] is True
    assert client.get(f"{path}/scripted-7B").json() == card


@pytest.mark.parametrize("path", ["/info", "/models/info"])
def test_info(client: httpx.Client, path: str) -> None:
    told = {
        "model_name": "scripted-7B",
        "model_type": "chat-completions",
        "model_provider_name": "Nobody",
    }
    assert client.get(path).json() == told
    head = client.head(path)
    assert (head.status_code, head.content) == (200, b"")


def test_the_type_that_info_tells_can_be_chosen() -> None:
    with running_stack(model_type="chat_completion") as stack:
        told = httpx.get(f"{stack.url}/info", headers=BEARER).json()
    assert told["model_type"] == "chat_completion"


def test_health_follows_the_service_and_needs_no_key() -> None:
    # A service of its own: others would hear a moment late that theirs serves again.
    with running_stack() as stack, httpx.Client(base_url=stack.url, timeout=PATIENCE) as probe:
        assert probe.get("/health/ready").status_code == 200
        stack.set_serving(False)
        check_error(probe.get("/health/ready"), 503, "ServiceUnavailable")
        assert probe.get("/health/live").status_code == 200


def test_a_service_that_is_not_there_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
    with (
        running_stack(target=nobody) as stack,
        httpx.Client(base_url=stack.url, headers=BEARER, timeout=PATIENCE) as client,
    ):
        begun = time.monotonic()
        for response in (
            client.get("/health/ready"),
            client.get("/info"),
            client.post("/chat/completions", json=chat_body("hello", stream=True)),
        ):
            message = check_error(response, 503, "ServiceUnavailable")
            assert "127.0.0.1" not in message
        assert time.monotonic() - begun < 9
        assert client.get("/health/live").status_code == 200


def test_a_service_with_another_key_is_not_the_clients_fault() -> None:
    with running_stack(key="another") as stack:
        response = httpx.get(f"{stack.url}/info", headers={"api-key": "another"})
        check_error(response, 503, "ServiceUnavailable")
