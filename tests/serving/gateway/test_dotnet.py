"""What .NET's packages send, answered as their readers expect it: they cannot be installed here.

The bodies are those of tests/clients/bodies/dotnet.jsonl. The readers' rules stand in the sources
of Azure.AI.Inference, OpenAI and Azure.AI.OpenAI: no key of a delta is null, a stream has `data`
lines alone and ends with [DONE], whole numbers are integers, and a call has an id, a name and
arguments that are a text.
"""

from typing import Any

import httpx
import pytest

from tests.support.fakes import Stack
from tests.support.gateway import events
from tests.support.structure_clients import recorded

ARGUMENTS = '{"town":"Paris","unit":"c"}'
_, BODIES = recorded("dotnet")
CHATS = [body for body in BODIES if "chat/completions" in body.path]


@pytest.fixture(autouse=True)
def names(stack: Stack) -> None:
    """The name of the recordings is one of the model's."""
    stack.service.aliases |= {"Tiny-Instruct"}


def scripted(body: dict[str, Any]) -> dict[str, Any]:
    """Returns a body whose last message has the scripted service call the first tool, or answer."""
    *earlier, last = body["messages"]
    if body.get("tool_choice", "auto") not in ("auto", "none"):
        name = body["tools"][0]["function"]["name"]
        last = last | {"content": f"!call:{name}:{ARGUMENTS}"}
    return body | {"messages": [*earlier, last]}


def check_call(call: dict[str, Any], body: dict[str, Any]) -> None:
    assert call["type"] == "function" and len(call["id"]) == 9 and call["id"].isalnum()
    assert call["function"] == {
        "name": body["tools"][0]["function"]["name"],
        "arguments": ARGUMENTS,
    }


@pytest.mark.parametrize("sent", CHATS, ids=[body.call for body in CHATS])
def test_a_chat_is_answered_as_its_reader_expects(
    client: httpx.Client, stack: Stack, sent: Any
) -> None:
    body = scripted(sent.body)
    is_forced = body.get("tool_choice", "auto") not in ("auto", "none")
    reason = "tool_calls" if is_forced else "stop"
    if body.get("stream"):
        with client.stream("POST", sent.path, json=body) as response:
            lines = list(response.iter_lines())
        check_stream(lines, body, is_forced=is_forced, reason=reason)
        return
    response = client.post(sent.path, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    (choice,) = answer["choices"]
    assert isinstance(answer["created"], int) and choice["finish_reason"] == reason
    assert all(isinstance(answer["usage"][name], int) for name in ("prompt_tokens", "total_tokens"))
    if is_forced:
        (call,) = choice["message"]["tool_calls"]
        check_call(call, body)
        assert choice["message"]["content"] == ""
    else:
        assert choice["message"]["content"] and choice["message"]["tool_calls"] is None


def check_stream(lines: list[str], body: dict[str, Any], *, is_forced: bool, reason: str) -> None:
    assert all(line.startswith("data: ") for line in lines[::2])
    assert set(lines[1::2]) == {""}
    assert lines[-2] == "data: [DONE]"
    chunks = list(events(iter(lines)))
    has_own_usage = bool(body.get("stream_options"))
    assert [bool(chunk["choices"]) for chunk in chunks[-2:]] == [True, not has_own_usage]
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert all(None not in delta.values() for delta in deltas)
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert len(calls) == is_forced
    for call in calls:
        check_call(call, body)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]]
    assert reasons == [None] * (len(reasons) - 1) + [reason]


SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
USER = {"role": "user", "content": "How many languages are in the world?"}
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}
OPENAI = (
    "/v1/chat/completions",
    "/openai/deployments/azureai/chat/completions?api-version=2025-04-01",
)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [SYSTEM, USER], "temperature": 7},
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, IMAGE]}]},
    ],
    ids=["temperature", "image", "image behind a text"],
)
def test_each_package_gets_the_status_that_it_reads(
    client: httpx.Client, body: dict[str, Any]
) -> None:
    azure = client.post("/chat/completions?api-version=2024-05-01-preview", json=body)
    assert azure.status_code == 422
    assert len(azure.json()["error"]["message"]) > 10 and azure.headers["x-ms-error-code"]
    for path in OPENAI:
        refused = client.post(path, json=body)
        assert refused.status_code == 400
        assert refused.json()["error"].keys() == {"message", "type", "param", "code"}


UNKNOWN = ("/v1/chat/completions", "/openai/deployments/no-such-model/chat/completions")


@pytest.mark.parametrize("path", UNKNOWN)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_unknown_model_is_404(client: httpx.Client, path: str, is_streamed: bool) -> None:
    body = {"messages": [SYSTEM, USER], "model": "no-such-model", "stream": is_streamed}
    answer = client.post(path, json=body)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "model_not_found" and error["param"] == "model"
    assert "'no-such-model'" in error["message"] and "'scripted-7B'" in error["message"]


@pytest.mark.parametrize("path", OPENAI)
def test_what_openais_package_sends_without_tools(client: httpx.Client, path: str) -> None:
    body = {
        "messages": [SYSTEM, USER],
        "model": "Tiny-Instruct",
        "max_completion_tokens": 16,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "stop": ["\n"],
        "logit_bias": {"50": -100},
        "seed": 3,
        "user": "u-1",
        "top_p": 0.9,
        "logprobs": True,
        "top_logprobs": 3,
    }
    answer = client.post(path, json=body).json()
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    for token in choice["logprobs"]["content"]:
        assert token["logprob"] <= 0 and len(token["top_logprobs"]) == 3


def test_the_history_may_have_every_script(client: httpx.Client, stack: Stack) -> None:
    said = ["Grüße \U0001f642 — 你好", "Hallo!", "And again?"]
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    answer = client.post("/chat/completions", json={"messages": [SYSTEM, *messages]}).json()
    assert answer["choices"][0]["message"]["content"] == "And again?"
    (call,) = stack.service.requests
    assert [message.content for message in call.chat.messages[1:]] == said
