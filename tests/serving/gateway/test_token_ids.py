"""vLLM's `return_token_ids`: ids of prompts and answers, at once and in streams."""

from typing import Any

import httpx

from tests.support.fakes import Stack
from tests.support.gateway import chat_body, events

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED = {"return_token_ids": True}


def streamed(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post(path, json=body | {"stream": True})
    return list(events(iter(answer.text.splitlines())))


def test_a_chat_at_once(client: httpx.Client, stack: Stack) -> None:
    answer = client.post(CHAT, json=chat_body("one two", n=2, **ASKED)).json()
    assert answer["prompt_token_ids"] == [100]  # the scripted service's, one for each message
    assert [choice["token_ids"] for choice in answer["choices"]] == [[0, 1], [0, 1]]
    assert stack.service.requests[0].return_prompt_ids
    silent = client.post(CHAT, json=chat_body("one two")).text
    assert "token_ids" not in silent and not stack.service.requests[1].return_prompt_ids


def test_a_chat_in_a_stream(client: httpx.Client) -> None:
    told = streamed(client, CHAT, chat_body("one two", **ASKED))
    assert told[0]["prompt_token_ids"] == [100]
    assert told[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert not any("prompt_token_ids" in event for event in told[1:])
    ids = [event["choices"][0].get("token_ids") for event in told]
    assert ids == [None, [0], [1], None]
    assert [event["choices"][0]["delta"]["content"] for event in told] == ["", "one", " two", ""]


def test_calls_of_tools_have_the_ids_of_their_tokens(client: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    body = chat_body("!call:f:{} !call:f:{}", tools=[tool], **ASKED)
    told = streamed(client, CHAT, body)
    assert [event["choices"][0].get("token_ids") for event in told] == [None, [0], [1], None]
    answer = client.post(CHAT, json=body).json()
    assert answer["choices"][0]["token_ids"] == [0, 1]


def test_texts_have_the_ids_of_their_own_prompt(client: httpx.Client) -> None:
    body = {"prompt": [[5, 6], [7]], "n": 2, **ASKED}
    choices = client.post(TEXT, json=body).json()["choices"]
    assert [choice["text"] for choice in choices] == ["5 6", "5 6", "7", "7"]
    assert [choice["prompt_token_ids"] for choice in choices] == [[5, 6], [5, 6], [7], [7]]
    assert [choice["token_ids"] for choice in choices] == [[0, 1], [0, 1], [0], [0]]
    first: dict[int, dict[str, Any]] = {}
    ids: dict[int, list[int]] = {}
    for event in streamed(client, TEXT, body):
        (choice,) = event["choices"]
        is_first = choice["index"] not in first
        assert ("prompt_token_ids" in choice) == is_first
        first.setdefault(choice["index"], choice)
        ids.setdefault(choice["index"], []).extend(choice.get("token_ids", []))
    assert [first[i]["prompt_token_ids"] for i in range(4)] == [[5, 6], [5, 6], [7], [7]]
    assert [ids[i] for i in range(4)] == [[0, 1], [0, 1], [0], [0]]


def test_they_stand_beside_logprobs_and_a_repeated_prompt(client: httpx.Client) -> None:
    (choice,) = client.post(TEXT, json={"prompt": [5], "logprobs": 1, **ASKED}).json()["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([5], [0])
    assert choice["logprobs"]["tokens"] == ["5"]
