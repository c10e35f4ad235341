"""The gateway over real sockets, before a service whose answers are worked out by hand."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from azure.ai.inference import ChatCompletionsClient
from azure.ai.inference.models import SystemMessage, UserMessage
from azure.core.credentials import AzureKeyCredential
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError

from serving.access.config import KEY_VARIABLE
from serving.errors import LEAVES
from serving.gateway.__main__ import main
from serving.gateway.answering import Limits
from serving.gateway.http import protocol
from serving.gateway.routes import PREFIXES
from tests.support.fakes import KEY, PATIENCE, Stack, running_stack

GOLDEN = Path(__file__).parents[2] / "golden"
BEARER = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def shared() -> Iterator[Stack]:
    with running_stack() as stack:
        yield stack


@pytest.fixture
def stack(shared: Stack) -> Stack:
    shared.service.reset()
    shared.set_serving(True)
    return shared


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, headers=BEARER, timeout=PATIENCE) as client:
        yield client


def body(text: str, **parameters: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} | parameters


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
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


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_completion(client: httpx.Client, stack: Stack, prefix: str) -> None:
    path = f"{prefix}/chat/completions".format(name="any")
    response = client.post(path, json=body("one two three", max_tokens=2, temperature=0))
    assert response.status_code == 200
    answer = response.json()
    assert re.fullmatch("[0-9a-f]{32}", answer.pop("id"))
    assert abs(answer.pop("created") - time.time()) < PATIENCE
    assert answer == {
        "object": "chat.completion",
        "model": "scripted-7B",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "one two", "tool_calls": None},
                "finish_reason": "length",
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }
    (request,) = stack.service.requests
    assert request.max_tokens == 2
    assert request.sampling.HasField("temperature")


@pytest.mark.parametrize(
    ("golden", "parameters"),
    [
        ("stream.txt", body("naïve \U0001f600")),
        (
            "stream_usage.txt",
            body("one two", max_tokens=1, stream_options={"include_usage": True}),
        ),
    ],
)
def test_a_stream_is_right_to_the_byte(
    stack: Stack, golden: str, parameters: dict[str, Any]
) -> None:
    connection = http.client.HTTPConnection(*address(stack), timeout=PATIENCE)
    with contextlib.closing(connection):
        sent = json.dumps(parameters | {"stream": True})
        connection.request("POST", "/chat/completions", sent, BEARER)
        with connection.getresponse() as response:
            headers, transcript = response.headers, response.read()
    assert headers["content-type"] == "text/event-stream"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert len(set(re.findall(rb'"id":"([0-9a-f]{32})"', transcript))) == 1
    assert len(set(re.findall(rb'"created":(\d+),', transcript))) == 1
    transcript = re.sub(rb'"id":"[0-9a-f]{32}"', b'"id":"ID"', transcript)
    transcript = re.sub(rb'"created":\d+', b'"created":0', transcript)
    assert transcript == (GOLDEN / golden).read_bytes()


def test_a_silent_stream_says_that_it_lives() -> None:
    with (
        running_stack(heartbeat_seconds=0.02) as stack,
        httpx.Client(base_url=stack.url, headers=BEARER, timeout=PATIENCE) as client,
        client.stream(
            "POST", "/chat/completions", json=body("one !wait two", stream=True)
        ) as response,
    ):
        chunks = []
        for chunk in events(response.iter_lines()):
            chunks.append(chunk)
            if not chunk["choices"]:
                stack.service.release()
    heartbeats = [chunk for chunk in chunks if not chunk["choices"]]
    assert heartbeats
    assert all(set(beat) == set(chunks[0]) for beat in heartbeats)
    spoken = [chunk["choices"][0]["delta"]["content"] for chunk in chunks if chunk["choices"]]
    assert spoken == ["", "one", " two", ""]


@pytest.mark.parametrize("is_stream", [False, True])
# A refused key is the gateway's own and has a test of its own.
@pytest.mark.parametrize("name", sorted(LEAVES.keys() - {"Unauthenticated"}))
def test_what_the_service_refuses_keeps_its_status(
    client: httpx.Client, name: str, is_stream: bool
) -> None:
    response = client.post("/chat/completions", json=body(f"!fail:{name}", stream=is_stream))
    message = check_error(response, LEAVES[name].http_status, LEAVES[name].azure_code)
    assert f"{name} was asked for" in message


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("!status:UNAVAILABLE", 503),
        ("!status:UNIMPLEMENTED", 503),
        ("!status:CANCELLED", 503),
        ("!status:RESOURCE_EXHAUSTED", 429),
        ("!status:INTERNAL", 424),
        ("!status:DATA_LOSS", 424),
        ("one !vanish", 424),
        ("!vanish", 424),
    ],
)
def test_what_grpc_says_stays_inside(client: httpx.Client, script: str, status: int) -> None:
    response = client.post("/chat/completions", json=body(script))
    assert response.status_code == status
    assert "10.0.0.1" not in response.text


@pytest.mark.parametrize("script", ["one !fail:EngineFailure", "one !vanish"])
def test_a_failure_in_mid_stream_breaks_the_connection(
    client: httpx.Client, caplog: pytest.LogCaptureFixture, script: str
) -> None:
    lines: list[str] = []
    with (
        pytest.raises(httpx.RemoteProtocolError),
        client.stream("POST", "/chat/completions", json=body(script, stream=True)) as response,
    ):
        assert response.status_code == 200
        for line in response.iter_lines():
            lines.append(line)  # one by one: what came before the end must be kept
    *_, spoken, last = events(iter(lines))
    assert spoken["choices"][0]["delta"] == {"content": "one"}
    assert last["choices"] == []
    assert last["error"]["code"] == "ModelError"
    journal = [
        record for record in caplog.records if record.name == "serving.gateway.http.access_log"
    ]
    assert [record.levelname for record in journal] == ["WARNING"]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("script", ["!wait", "one !wait"])
def test_a_client_that_drops_cancels_its_call(stack: Stack, script: str, is_stream: bool) -> None:
    sent = json.dumps(body(script, stream=is_stream)).encode()
    head = f"POST /chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    with socket.create_connection(address(stack), timeout=PATIENCE) as connection:
        connection.sendall(f"{head}content-length: {len(sent)}\r\n\r\n".encode() + sent)
        assert stack.service.begun.wait(PATIENCE)
        if is_stream and script.startswith("one"):
            assert connection.recv(1)
        assert not stack.service.cancelled.is_set()
    assert stack.service.cancelled.wait(PATIENCE)


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
            {"guided_json": {}},
            422,
            "parameter_not_supported",
        ),
        ("/models/chat/completions", {}, {"safe_prompt": True, "random_seed": 1}, 200, ""),
        ("/models/chat/completions", {}, {"n": 2}, 400, "BadRequest"),
        ("/openai/v1/chat/completions", {}, {"n": 2}, 200, ""),
        ("/openai/deployments/any/chat/completions", {}, {"n": 2, "user": "u"}, 200, ""),
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
        ("/chat/completions", {}, {"tools": [{}]}, 422, "parameter_not_supported"),
        (
            "/chat/completions",
            {},
            {"response_format": {"type": "json_object"}},
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
        content = json.dumps(body("hello") | content).encode()
    response = client.post(path, headers=headers, content=content)
    if status == 200:
        assert response.status_code == 200, response.text
    else:
        check_error(response, status, code)


def test_several_choices(client: httpx.Client) -> None:
    asked = body("one two", n=2, logprobs=True, top_logprobs=1)
    answer = client.post("/v1/chat/completions", json=asked).json()
    top = {"token": " two", "token_id": 1, "logprob": -1.0, "bytes": list(b" two")}
    for index, choice in enumerate(answer["choices"]):
        assert (choice["index"], choice["message"]["content"]) == (index, "one two")
        assert choice["finish_reason"] == "stop"
        assert choice["logprobs"]["content"][1] == top | {"top_logprobs": [top]}
    assert len(answer["choices"]) == 2
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}

    with client.stream("POST", "/v1/chat/completions", json=asked | {"stream": True}) as response:
        chunks = list(events(response.iter_lines()))
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1] * 4
    for index in range(2):
        first, one, two, last = chunks[index::2]
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert one["choices"][0]["delta"] == {"content": "one"}
        assert two["choices"][0]["logprobs"] == {"content": [top | {"top_logprobs": [top]}]}
        assert last["choices"][0]["finish_reason"] == "stop"
    assert [("usage" in chunk) for chunk in chunks] == [False] * 7 + [True]


@pytest.mark.parametrize("penalty", [0.1, "0.1"])
def test_the_samples_that_explore_parameters(stack: Stack, penalty: object) -> None:
    """Of Microsoft's page, whose JavaScript sends strings."""
    with ChatCompletionsClient(stack.url, AzureKeyCredential(KEY)) as azure:
        answer = azure.complete(
            body(
                "one",
                presence_penalty=penalty,
                frequency_penalty=0.8,
                max_tokens=2048,
                stop=["<|endoftext|>"],
                temperature=0,
                top_p=1,
                response_format={"type": {"type": "text"}},
            )
        )
        assert answer.choices[0].message.content == "one"
        passed = azure.complete(
            messages=[UserMessage("one")],
            model_extras={"logprobs": True, "min_tokens": 1, "top_k": 5, "ignore_eos": True},
        )
        assert passed.choices[0]["logprobs"]["content"][0]["token"] == "one"
    first, second = stack.service.requests
    sampling = first.sampling
    assert sampling.presence_penalty == pytest.approx(0.1)
    assert sampling.frequency_penalty == pytest.approx(0.8)
    assert (second.min_tokens, second.sampling.top_k, second.ignore_eos) == (1, 5, True)


def test_the_sentence_that_litellm_reads(client: httpx.Client) -> None:
    response = client.post("/chat/completions", json=body("hello", wine="red", n=2))
    sentence = check_error(response, 400, "BadRequest")
    assert response.json()["detail"] == sentence
    assert "Set extra-parameters to 'pass-through'" in response.text
    listed = response.text[response.text.index("[") :]
    assert listed.startswith("['wine', 'n']")


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


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "words"),
    [
        ("POST", "/embeddings", 404, "NotFound", "not found"),
        ("POST", "/images/embeddings", 404, "NotFound", "Modality not supported"),
        ("POST", "/models/embeddings", 404, "NotFound", "Modality not supported"),
        ("POST", "/v1/embeddings", 404, "NotFound", "Modality not supported"),
        ("GET", "/v1/models/another", 404, "NotFound", "not found"),
        ("GET", "/v1/models/org/another", 404, "NotFound", "this endpoint serves 'scripted-7B'"),
        ("GET", "/usage?all=perhaps", 422, "Invalid input", "boolean"),
        ("GET", "/", 404, "NotFound", "not found"),
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
    ("method", "path"),
    [
        ("POST", "/chat/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/info"),
        ("GET", "/v1/models"),
        ("GET", "/usage"),
    ],
)
def test_a_key_is_needed(stack: Stack, method: str, path: str) -> None:
    with httpx.Client(base_url=stack.url, timeout=PATIENCE) as stranger:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"api-key": "wrong"}):
            response = stranger.request(method, path, headers=headers, json=body("hello"))
            assert "auth token validation failed" in check_error(response, 401, "Unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        for headers in ({"authorization": KEY}, {"api-key": KEY}):
            response = stranger.request(method, path, headers=headers, json=body("hello"))
            assert response.status_code == 200
    assert len(stack.service.requests) == (2 if method == "POST" else 0)


def test_a_text_completion(client: httpx.Client, stack: Stack) -> None:
    answer = client.post("/v1/completions", json={"prompt": "one two three", "max_tokens": 2})
    whole = answer.json()
    assert re.fullmatch("[0-9a-f]{32}", whole.pop("id"))
    assert abs(whole.pop("created") - time.time()) < PATIENCE
    assert whole == {
        "object": "text_completion",
        "model": "scripted-7B",
        "choices": [{"text": "one two", "index": 0, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }
    assert stack.service.requests[0].text == "one two three"


@pytest.mark.parametrize("path", ["/completions", "/v1/completions", "/openai/v1/completions"])
def test_several_prompts_are_answered_together(client: httpx.Client, path: str) -> None:
    asked = {"prompt": ["one two", [5], "six"], "n": 2, "logprobs": 0, "model": "any"}
    answer = client.post(path, json=asked).json()
    assert [choice["text"] for choice in answer["choices"]] == ["one two"] * 2 + ["5"] * 2 + [
        "six"
    ] * 2
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["choices"][1]["logprobs"] == {
        "tokens": ["one", " two"],
        "token_logprobs": [0.0, -1.0],
        "top_logprobs": [{}, {}],
        "text_offset": [0, 3],
    }
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}

    with client.stream("POST", path, json=asked | {"stream": True}) as response:
        assert response.headers["content-type"] == "text/event-stream"
        lines = list(response.iter_lines())
    assert lines[-2:] == ["data: [DONE]", ""]
    texts = dict.fromkeys(range(6), "")
    chunks = list(events(iter(lines)))
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "one two", 1: "one two", 2: "5", 3: "5", 4: "six", 5: "six"}
    assert [chunk.get("usage") for chunk in chunks][-1] == answer["usage"]
    assert not any("usage" in chunk for chunk in chunks[:-1])


@pytest.mark.parametrize("is_stream", [False, True])
def test_one_prompt_that_fails_fails_all(client: httpx.Client, is_stream: bool) -> None:
    asked = {"prompt": ["!fail:Overloaded", "!wait"], "stream": is_stream}
    check_error(client.post("/v1/completions", json=asked), 429, "TooManyRequests")


def test_a_client_that_drops_cancels_all_prompts(stack: Stack) -> None:
    sent = json.dumps({"prompt": ["one !wait", "two !wait"], "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    with socket.create_connection(address(stack), timeout=PATIENCE) as connection:
        connection.sendall(f"{head}content-length: {len(sent)}\r\n\r\n".encode() + sent)
        assert connection.recv(1)
    assert stack.service.cancelled.wait(PATIENCE)


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


def test_every_answer_names_its_request(client: httpx.Client) -> None:
    theirs = {"x-ms-client-request-id": "theirs"}
    seen = set()
    for response in (
        client.post("/chat/completions", json=body("one"), headers=theirs),
        client.post("/chat/completions", json=body("one", stream=True), headers=theirs),
        client.post("/chat/completions", content=b"{", headers=theirs),
        client.get("/nothing", headers=theirs),
    ):
        assert response.headers["x-ms-client-request-id"] == "theirs"
        seen.add(response.headers["x-request-id"])
        assert "x-request-id" in response.headers
    assert len(seen) == 4
    response = client.post("/chat/completions", json=body("one"))
    assert response.json()["id"] == response.headers["x-request-id"]
    assert "x-ms-client-request-id" not in response.headers


def test_pages_of_other_origins_may_ask_if_they_are_allowed(client: httpx.Client) -> None:
    asks = {"origin": "https://a.example", "access-control-request-method": "POST"}
    asks["access-control-request-headers"] = "authorization,content-type"
    check_error(client.options("/chat/completions", headers=asks), 405, "MethodNotAllowed")
    with running_stack(cors_origins=["https://a.example"]) as stack:
        url = f"{stack.url}/chat/completions"
        allowed = httpx.options(url, headers=asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        assert httpx.options(url, headers=asks | {"origin": "https://b.example"}).status_code == 400
        answer = httpx.post(url, json=body("one"), headers=BEARER | {"origin": asks["origin"]})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


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


def test_a_head_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.05)
    with running_stack() as stack:
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


def test_dotnets_client(stack: Stack) -> None:
    """Azure.AI.Inference cannot run here: what it sends, by the rules of what reads the answer."""
    sent = {
        "accept": "application/json",
        "content-type": "application/json",
        "authorization": f"Bearer {KEY}",
        "api-key": KEY,
        "user-agent": "azsdk-net-AI.Inference/1.0.0-beta.5 (.NET 8.0.11; Ubuntu 24.04)",
        "x-ms-client-request-id": "0b5b0b1d-5c4e-4f0a-8f4c-9c0b6a0e5d11",
        "x-ms-return-client-request-id": "true",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
    }
    path = "/chat/completions?api-version=2024-05-01-preview"
    messages = [
        {"content": "be brief", "role": "system"},
        {"content": "one two", "role": "user"},
        {"role": "assistant"},  # .NET leaves an empty content out
        {"content": "one two", "role": "user"},
    ]
    asked: dict[str, Any] = {"messages": messages, "temperature": 1, "max_tokens": 5}
    with httpx.Client(base_url=stack.url, timeout=PATIENCE) as client:
        answer = client.post(path, headers=sent, json=asked)
        assert answer.headers["x-ms-client-request-id"] == sent["x-ms-client-request-id"]
        told = answer.json()
        assert isinstance(told["created"], int)  # GetInt64
        assert told["choices"][0]["message"]["content"] == "one two"
        assert {type(each) for each in told["usage"].values()} == {int}

        extras = sent | {"extra-parameters": "pass-through"}
        refused = client.post(path, headers=extras, json=asked | {"wine": "red"})
        assert "Extra inputs are not permitted" in check_error(refused, 422, "Invalid input")

        with client.stream("POST", path, headers=sent, json=asked | {"stream": True}) as stream:
            raw = stream.read()
    # Every line is a field `data` or empty, no two fields stand together, nothing follows [DONE].
    lines = raw.split(b"\n")
    assert b"\r" not in raw
    assert all(line.startswith(b"data: ") for line in lines[:-2:2])
    assert set(lines[1::2]) | {lines[-1]} == {b""}
    assert lines[-3] == b"data: [DONE]"
    chunks = list(events(iter(raw.decode().split("\n"))))
    roles = [chunk["choices"][0]["delta"].get("role") for chunk in chunks]
    assert roles == ["assistant", None, None, None]
    assert (
        len({chunk["id"] for chunk in chunks}) == len({chunk["created"] for chunk in chunks}) == 1
    )
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        assert None not in delta.values()  # its first versions fail at null
        assert "tool_calls" not in delta
        assert chunk["choices"][0]["finish_reason"] in (None, "stop")


def test_health_follows_the_service_and_needs_no_key(stack: Stack) -> None:
    with httpx.Client(base_url=stack.url, timeout=PATIENCE) as probe:
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
            client.post("/chat/completions", json=body("hello", stream=True)),
        ):
            message = check_error(response, 503, "ServiceUnavailable")
            assert "127.0.0.1" not in message
        assert time.monotonic() - begun < 5
        assert client.get("/health/live").status_code == 200


def test_a_service_with_another_key_is_not_the_clients_fault() -> None:
    with running_stack(key="another") as stack:
        response = httpx.get(f"{stack.url}/info", headers={"api-key": "another"})
        check_error(response, 503, "ServiceUnavailable")


def test_azures_client(stack: Stack) -> None:
    messages = [SystemMessage("be brief"), UserMessage("one two")]
    with ChatCompletionsClient(stack.url, AzureKeyCredential(KEY)) as client:
        info = client.get_model_info()
        assert (info.model_name, info.model_type) == ("scripted-7B", "chat-completions")
        assert info.model_provider_name == "Nobody"

        answer = client.complete(messages=messages, temperature=0, max_tokens=5)
        assert answer.choices[0].message.content == "one two"
        assert answer.choices[0].finish_reason == "stop"
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (2, 4)

        updates = list(client.complete(messages=messages, stream=True))
        assert [update.choices[0].delta.content for update in updates] == ["", "one", " two", ""]
        assert [update.usage for update in updates[:-1]] == [None, None, None]
        assert updates[-1].usage is not None
        assert updates[-1].usage.completion_tokens == 2

        with pytest.raises(HttpResponseError, match="Extra inputs are not permitted") as caught:
            client.complete(messages=messages, model_extras={"wine": "red"})
        assert caught.value.status_code == 422

        broken = client.complete(stream=True, **body("one !fail:EngineFailure"))
        with pytest.raises(HttpResponseError):
            list(broken)
    with (
        ChatCompletionsClient(stack.url, AzureKeyCredential("wrong")) as stranger,
        pytest.raises(ClientAuthenticationError, match="auth token validation failed"),
    ):
        stranger.complete(messages=messages)


def test_the_command_serves_logs_a_line_and_ends_in_peace(stack: Stack) -> None:
    command = [sys.executable, "-m", "serving.gateway", "--port", "0", "--target", stack.target]
    with subprocess.Popen(
        command, env=os.environ | {KEY_VARIABLE: KEY}, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            url = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())
            assert url is not None
            with httpx.Client(base_url=url[0], headers=BEARER, timeout=PATIENCE) as client:
                assert client.get("/health/ready").status_code == 200
                for _ in range(2):
                    with pytest.raises(httpx.RemoteProtocolError):
                        client.post(
                            "/chat/completions", json=body("one !fail:EngineFailure", stream=True)
                        )
            process.send_signal(signal.SIGTERM)
            log = process.stderr.read()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    lines = log.splitlines()
    assert len(lines) == 2, log
    told = 'outcome=broken error=ModelError reason="EngineFailure was asked for"'
    assert all(told in line for line in lines)


def test_the_gateway_needs_nothing_of_the_model() -> None:
    code = "import sys, serving.gateway.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    names = set(loaded.stdout.decode().split())
    assert "serving.gateway.app" in names
    assert not names & {"jax", "flax", "numpy", "mixtral_jax", "convert", "serving.service.service"}


def test_what_is_wrong_before_the_start_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert main(["--port", "0"]) == 1
    assert KEY_VARIABLE in capsys.readouterr().err
    monkeypatch.setenv(KEY_VARIABLE, "two words")
    assert main(["--port", "0"]) == 1
    assert KEY_VARIABLE in capsys.readouterr().err
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        assert main(["--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: port {port} of 127\.0\.0\.1 is in use; .*--port\n", said)
    with pytest.raises(SystemExit, match="2"):
        main(["--port", "99999"])
    assert "--port" in capsys.readouterr().err


def address(stack: Stack) -> tuple[str, int]:
    url = httpx.URL(stack.url)
    assert url.port is not None
    return url.host, url.port
