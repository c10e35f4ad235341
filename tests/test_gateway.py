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
from fakes import KEY, PATIENCE, Stack, running_stack

from serving.errors import LEAVES
from serving.gateway.__main__ import KEY_VARIABLE, main

GOLDEN = Path(__file__).parent / "golden"
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


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions"])
def test_a_completion(client: httpx.Client, stack: Stack, path: str) -> None:
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
    assert [record for record in caplog.records if "broke off" in record.message]


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
            {"safe_prompt": True},
            422,
            "parameter_not_supported",
        ),
        ("/chat/completions", {}, {"ignore_eos": True}, 400, "BadRequest"),
        ("/v1/chat/completions", {}, {"wine": 1}, 200, ""),
        ("/v1/chat/completions", {"extra-parameters": "perhaps"}, {}, 200, ""),
        ("/v1/chat/completions", {}, {"n": 2}, 200, ""),
        ("/v1/chat/completions", {}, {"n": 0}, 422, "Invalid input"),
        ("/v1/chat/completions", {}, {"top_logprobs": 2}, 422, "Invalid input"),
        ("/v1/chat/completions", {}, {"safe_prompt": True}, 422, "parameter_not_supported"),
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
        ("GET", "/", 404, "NotFound", "not found"),
        ("GET", "/info/", 404, "NotFound", "not found"),
        ("GET", "/docs", 404, "NotFound", "not found"),
        ("GET", "/openapi.json", 404, "NotFound", "not found"),
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
    [("POST", "/chat/completions"), ("POST", "/v1/chat/completions"), ("GET", "/info")],
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
    assert all("broke off: EngineFailure: EngineFailure was asked for" in line for line in lines)


def test_the_gateway_needs_nothing_of_the_model() -> None:
    code = "import sys, serving.gateway.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    names = set(loaded.stdout.decode().split())
    assert "serving.gateway.app" in names
    assert not names & {"jax", "flax", "numpy", "mixtral_jax", "convert", "serving.service"}


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
