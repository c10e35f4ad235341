"""Answers at once and as streams, failures, and clients that drop, over real sockets."""

import contextlib
import http.client
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.accounting.caller_fields import CallerFields
from serving.errors import (
    LEAVES,
)
from serving.gateway.http.access_log import LOGGER
from serving.gateway.routes import PREFIXES
from serving.proto import inference_pb2 as pb
from tests.support.fakes import KEY, PATIENCE, Stack, running_stack
from tests.support.gateway import BEARER, address, chat_body, check_error, events

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_completion(client: httpx.Client, stack: Stack, prefix: str) -> None:
    path = f"{prefix}/chat/completions".format(name="scripted-7B")
    response = client.post(path, json=chat_body("one two three", max_tokens=2, temperature=0))
    assert response.status_code == 200
    answer = response.json()
    # OpenAI's own clients look at how an id begins; Azure's API has bare ones.
    begin = "chatcmpl-" if prefix.startswith(("/v1", "/openai")) else ""
    assert re.fullmatch(f"{begin}[0-9a-f]{{32}}", answer.pop("id"))
    assert abs(answer.pop("created") - time.time()) < PATIENCE
    stop = {"stop_reason": None} if begin else {}
    scores = {"prompt_logprobs": None} if begin else {}
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
            | stop
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        **scores,
    }
    (request,) = stack.service.requests
    assert request.max_tokens == 2
    assert request.sampling.HasField("temperature")


@pytest.mark.parametrize(
    ("golden", "parameters"),
    [
        ("stream.txt", chat_body("naïve \U0001f600")),
        (
            "stream_usage.txt",
            chat_body("one two", max_tokens=1, stream_options={"include_usage": True}),
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
            "POST", "/chat/completions", json=chat_body("one !wait two", stream=True)
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


def test_a_stream_that_waits_for_its_first_token_says_that_it_lives() -> None:
    """Chunks of the service that show the progress of a prompt do not end the silence."""
    waiting = "!open " + "!compute " * 5 + "!wait one"
    with (
        running_stack(heartbeat_seconds=0.02) as stack,
        httpx.Client(base_url=stack.url, headers=BEARER, timeout=PATIENCE) as client,
        client.stream("POST", "/v1/completions", json={"prompt": waiting, "stream": True}) as got,
    ):
        chunks = []
        for chunk in events(got.iter_lines()):
            chunks.append(chunk)
            if len(chunks) == 2:
                stack.service.release()
    assert chunks[0]["choices"] == chunks[1]["choices"] == []
    assert [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]] == ["one", ""]


def test_a_failure_before_the_prompt_is_queued_is_a_status(client: httpx.Client) -> None:
    asked = chat_body("!fail:ContextTooLong", stream=True)
    check_error(client.post("/chat/completions", json=asked), 400, "context_length_exceeded")
    asked = chat_body("!open !fail:EngineFailure", stream=True)
    with client.stream("POST", "/chat/completions", json=asked) as response:
        assert response.status_code == 200
        chunks = []
        with pytest.raises(httpx.RemoteProtocolError):
            for chunk in events(response.iter_lines()):
                chunks.append(chunk)
    assert chunks[-1]["error"]["code"] == "ModelError"
    # Of several prompts each must have been queued.
    asked = {"prompt": ["!open !wait", "!fail:ContextTooLong"], "stream": True}
    check_error(client.post("/v1/completions", json=asked), 400, "context_length_exceeded")


def test_several_choices(client: httpx.Client) -> None:
    asked = chat_body("one two", n=2, logprobs=True, top_logprobs=1)
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


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions"])
def test_calls_of_tools(client: httpx.Client, stack: Stack, path: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    asked = chat_body('!call:f:{"a":1} !call:f:{}', tools=[tool], tool_choice="required")
    answer = client.post(path, json=asked).json()
    calls = [
        {
            "id": f"call0000{place}",
            "type": "function",
            "index": place,
            "function": {"name": "f", "arguments": arguments},
        }
        for place, arguments in enumerate(['{"a":1}', "{}"])
    ]
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "", "tool_calls": calls}
    assert choice["finish_reason"] == "tool_calls"
    assert answer["usage"]["completion_tokens"] == 2
    (call,) = stack.service.requests
    assert call.chat.tools == [pb.Tool(name="f", parameters='{"type":"object"}')]
    assert call.chat.tool_choice.mode == pb.ToolChoice.MODE_REQUIRED

    with client.stream("POST", path, json=asked | {"stream": True}) as response:
        opening, *middle, last = events(response.iter_lines())
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [chunk["choices"][0]["delta"] for chunk in middle]
    assert deltas == [{"content": "", "tool_calls": [call]} for call in calls]
    assert last["choices"][0]["delta"] == {"content": ""}
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert last["usage"] == answer["usage"]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_what_the_service_has_weakened_stands_in_a_header(
    client: httpx.Client, path: str, is_stream: bool
) -> None:
    asked = {"stream": is_stream, "guided_json": {"type": "object"}}
    for script, told in (("!weak:/a/not one", "/a/not"), ("one", None)):
        prompt = chat_body(script) if "chat" in path else {"prompt": [script, script]}
        answer = client.post(path, json=asked | prompt)
        assert answer.status_code == 200
        assert answer.headers.get("x-mixtral-weakened") == told
    long = chat_body(f"!weak:{'x' * 1500} one")
    answer = client.post("/v1/chat/completions", json=asked | long)
    assert answer.headers["x-mixtral-weakened"] == "x" * 1024


def test_an_answer_that_misses_a_part_of_its_schema_says_so(client: httpx.Client) -> None:
    for script, told in (("one !miss:/a\u00e9/not", "/a?/not"), ("one", None)):
        answer = client.post("/v1/chat/completions", json=chat_body(script, guided_json={}))
        assert answer.json()["choices"][0]["message"]["content"] == "one"
        assert answer.headers.get("x-mixtral-violation") == told


def test_a_text_completion(client: httpx.Client, stack: Stack) -> None:
    answer = client.post("/v1/completions", json={"prompt": "one two three", "max_tokens": 2})
    whole = answer.json()
    assert re.fullmatch("cmpl-[0-9a-f]{32}", whole.pop("id"))
    assert abs(whole.pop("created") - time.time()) < PATIENCE
    assert whole == {
        "object": "text_completion",
        "model": "scripted-7B",
        "choices": [
            {
                "text": "one two",
                "index": 0,
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "prompt_logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }
    assert stack.service.requests[0].text == "one two three"


@pytest.mark.parametrize("path", ["/completions", "/v1/completions", "/openai/v1/completions"])
def test_several_prompts_are_answered_together(client: httpx.Client, path: str) -> None:
    asked = {"prompt": ["one two", [5], "six"], "n": 2, "logprobs": 0, "model": "azureai"}
    answer = client.post(path, json=asked).json()
    assert [choice["text"] for choice in answer["choices"]] == ["one two"] * 2 + ["5"] * 2 + [
        "six"
    ] * 2
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["choices"][1]["logprobs"] == {
        "tokens": ["one", " two"],
        "token_logprobs": [0.0, -1.0],
        "top_logprobs": [{"one": 0.0}, {" two": -1.0}],
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
def test_more_prompts_than_are_asked_at_a_time(
    client: httpx.Client, stack: Stack, is_stream: bool
) -> None:
    """Each arrives with all its fields, though they are added when it is sent."""
    prompts = [str(place) for place in range(200)]
    asked = {"prompt": prompts, "max_tokens": 5, "stop": ["x"], "seed": 3, "stream": is_stream}
    response = client.post("/v1/completions", json=asked)
    if is_stream:
        chunks = list(events(iter(response.text.splitlines())))
        said = dict.fromkeys(range(200), "")
        for part in (part for each in chunks for part in each["choices"]):
            said[part["index"]] += part["text"]
        last = chunks[-1]
    else:
        last = response.json()
        said = {choice["index"]: choice["text"] for choice in last["choices"]}
    assert [said[place] for place in range(200)] == prompts
    assert last["usage"] == {"prompt_tokens": 200, "completion_tokens": 200, "total_tokens": 400}
    sent = {request.text: request for request in stack.service.requests}
    assert sent.keys() == set(prompts)
    assert {
        (call.max_tokens, *call.stop, call.sampling.seed, call.sampling.temperature)
        for call in sent.values()
    } == {(5, "x", 3, 1.0)}


@pytest.mark.parametrize("path", ["/completions", "/v1/completions"])
def test_a_prompt_that_is_too_long_is_named(client: httpx.Client, path: str) -> None:
    prompts: list[Any] = ["one"] * 150
    for wrong in ("!long", [5] * 65):  # refused by the service, and by the gateway itself
        prompts[140] = wrong
        response = client.post(path, json={"prompt": prompts})
        message = check_error(response, 400, "context_length_exceeded")
        assert message.endswith(" It is prompt[140].")
        if path == "/v1/completions":
            assert response.json()["error"]["param"] == "prompt[140]"


@pytest.mark.parametrize("is_stream", [False, True])
def test_one_prompt_that_fails_fails_all(client: httpx.Client, is_stream: bool) -> None:
    asked = {"prompt": ["!fail:Overloaded", "!wait"], "stream": is_stream}
    check_error(client.post("/v1/completions", json=asked), 429, "TooManyRequests")


@pytest.mark.parametrize("is_stream", [False, True])
# A key that is refused or opens too little is the gateway's own and has tests of its own.
@pytest.mark.parametrize("name", sorted(LEAVES.keys() - {"Unauthenticated", "Forbidden"}))
def test_what_the_service_refuses_keeps_its_status(
    client: httpx.Client, name: str, is_stream: bool
) -> None:
    response = client.post("/chat/completions", json=chat_body(f"!fail:{name}", stream=is_stream))
    message = check_error(response, LEAVES[name].http_status, LEAVES[name].azure_code)
    assert f"{name} was asked for" in message


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_key_that_is_not_taken_for_a_gateways_is_the_operators_matter(
    client: httpx.Client, is_stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    response = client.post("/chat/completions", json=chat_body("!fail:Forbidden", stream=is_stream))
    assert "Forbidden" not in check_error(response, 503, "ServiceUnavailable")
    assert "MIXTRAL_JAX_SERVICE_KEY" in caplog.text and "Forbidden was asked for" in caplog.text


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
    response = client.post("/chat/completions", json=chat_body(script))
    assert response.status_code == status
    assert "10.0.0.1" not in response.text


@pytest.mark.parametrize("script", ["one !fail:EngineFailure", "one !vanish"])
def test_a_failure_in_mid_stream_breaks_the_connection(
    client: httpx.Client, caplog: pytest.LogCaptureFixture, script: str
) -> None:
    lines: list[str] = []
    with (
        pytest.raises(httpx.RemoteProtocolError),
        client.stream("POST", "/chat/completions", json=chat_body(script, stream=True)) as response,
    ):
        assert response.status_code == 200
        for line in response.iter_lines():
            lines.append(line)  # one by one: what came before the end must be kept
    *_, spoken, last = events(iter(lines))
    assert spoken["choices"][0]["delta"] == {"content": "one"}
    assert last["choices"] == []
    assert last["error"]["code"] == "ModelError"
    logged = [record for record in caplog.records if record.name == LOGGER]
    assert [record.levelname for record in logged] == ["WARNING"]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("script", ["!wait", "one !wait"])
def test_a_client_that_drops_cancels_its_call(stack: Stack, script: str, is_stream: bool) -> None:
    sent = json.dumps(chat_body(script, stream=is_stream)).encode()
    head = f"POST /chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    with socket.create_connection(address(stack), timeout=PATIENCE) as connection:
        connection.sendall(f"{head}content-length: {len(sent)}\r\n\r\n".encode() + sent)
        assert stack.service.begun.wait(PATIENCE)
        if is_stream and script.startswith("one"):
            assert connection.recv(1)
        assert not stack.service.cancelled.is_set()
    assert stack.service.cancelled.wait(PATIENCE)


def test_a_client_that_drops_cancels_all_prompts(stack: Stack) -> None:
    sent = json.dumps({"prompt": ["one !wait", "two !wait"], "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    with socket.create_connection(address(stack), timeout=PATIENCE) as connection:
        connection.sendall(f"{head}content-length: {len(sent)}\r\n\r\n".encode() + sent)
        assert connection.recv(1)
    assert stack.service.cancelled.wait(PATIENCE)


def test_every_answer_names_its_request(client: httpx.Client) -> None:
    theirs = {"x-ms-client-request-id": "theirs"}
    seen = set()
    for response in (
        client.post("/chat/completions", json=chat_body("one"), headers=theirs),
        client.post("/chat/completions", json=chat_body("one", stream=True), headers=theirs),
        client.post("/chat/completions", content=b"{", headers=theirs),
        client.get("/nothing", headers=theirs),
    ):
        assert response.headers["x-ms-client-request-id"] == "theirs"
        seen.add(response.headers["x-request-id"])
        assert "x-request-id" in response.headers
    assert len(seen) == 4
    response = client.post("/chat/completions", json=chat_body("one"))
    assert response.json()["id"] == response.headers["x-request-id"]
    assert "x-ms-client-request-id" not in response.headers


def test_the_service_is_told_who_asks(client: httpx.Client, stack: Stack) -> None:
    fields = CallerFields(KEY)
    asked = {"prompt": ["one", "two"], "max_tokens": 1}
    assert client.post("/v1/completions", json=asked).status_code == 200
    assert client.post("/v1/chat/completions", json=chat_body("one")).status_code == 200
    for call in stack.service.requests:
        assert (call.caller, call.cache_salt) == ("default", fields.salt("default"))
        assert (call.priority, call.suspect) == (pb.PRIORITY_INTERACTIVE, False)
    stack.service.requests.clear()
    own = chat_body("one", cache_salt="mine", priority=1)
    answers = [
        client.post("/v1/chat/completions", json=own),
        client.post("/chat/completions", json=own, headers={"extra-parameters": "pass-through"}),
        client.post("/v1/chat/completions", json=chat_body("one", service_tier="flex")),
        client.post(
            "/v1/chat/completions", json=chat_body("one", service_tier="auto", priority=-1)
        ),
    ]
    assert [answer.status_code for answer in answers] == [200] * 4
    mine, none = fields.salt("default", "mine"), fields.salt("default")
    assert [call.cache_salt for call in stack.service.requests] == [mine, mine, none, none]
    batch, interactive = pb.PRIORITY_BATCH, pb.PRIORITY_INTERACTIVE
    expected = [batch, batch, batch, interactive]
    assert [call.priority for call in stack.service.requests] == expected


@pytest.mark.parametrize(
    "wrong", [{"cache_salt": ""}, {"cache_salt": "x" * 257}, {"service_tier": "best"}]
)
def test_a_salt_or_a_class_that_cannot_be_is_refused(
    client: httpx.Client, wrong: dict[str, str]
) -> None:
    response = client.post("/v1/chat/completions", json=chat_body("one") | wrong)
    assert next(iter(wrong)) in check_error(response, 422, "Invalid input")
    response = client.post("/chat/completions", json=chat_body("one") | wrong)
    assert "Extra parameters" in check_error(response, 400, "BadRequest")
