"""Azure's own clients, and what its .NET client sends, before the gateway."""

from typing import Any

import httpx
import pytest
from azure.ai.inference import ChatCompletionsClient
from azure.ai.inference.models import SystemMessage, UserMessage
from azure.core.credentials import AzureKeyCredential
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError

from tests.support.fakes import KEY, PATIENCE, Stack
from tests.support.gateway import chat_body, check_error, events


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

        broken = client.complete(stream=True, **chat_body("one !fail:EngineFailure"))
        with pytest.raises(HttpResponseError):
            list(broken)
    with (
        ChatCompletionsClient(stack.url, AzureKeyCredential("wrong")) as stranger,
        pytest.raises(ClientAuthenticationError, match="auth token validation failed"),
    ):
        stranger.complete(messages=messages)


@pytest.mark.parametrize("penalty", [0.1, "0.1"])
def test_the_samples_that_explore_parameters(stack: Stack, penalty: object) -> None:
    """Of Microsoft's page, whose JavaScript sends strings."""
    with ChatCompletionsClient(stack.url, AzureKeyCredential(KEY)) as azure:
        answer = azure.complete(
            chat_body(
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
