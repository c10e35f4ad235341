"""What clients have sent to the Messages API is answered, at once and as a stream alike."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serving.gateway.dialect.anthropic.response import MessageObject
from tests.serving.gateway.dialect.anthropic.test_stream import joined, parsed
from tests.support.client_envs import CLIENTS
from tests.support.fakes import KEY, PATIENCE, Stack, running_stack

BODIES = {
    f"{path.stem} {number} {sent['call']}": sent["body"]
    for path in sorted((CLIENTS / "bodies").glob("*.jsonl"))
    for number, sent in enumerate(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
    if sent.get("path", "").endswith("/messages")
}
# The fields that Claude Code 2.1 sends in each of its requests, with texts and tools of ours.
CLAUDE_CODE: dict[str, Any] = {
    "model": "any",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>\nToday is Friday.\n</system-reminder>"},
                {"type": "text", "text": "one two", "cache_control": {"type": "ephemeral"}},
            ],
        },
        {"role": "system", "content": "three"},
    ],
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cc_entrypoint=cli;"},
        {"type": "text", "text": "You are brief.", "cache_control": {"type": "ephemeral"}},
    ],
    "tools": [
        {
            "name": "Read",
            "description": "Reads a file.",
            "input_schema": {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "type": "object",
                "properties": {
                    "file_path": {"type": "string"},
                    "limit": {"type": "integer", "exclusiveMinimum": 0, "maximum": 2**53 - 1},
                },
                "required": ["file_path"],
                "additionalProperties": False,
            },
        }
    ],
    "metadata": {"user_id": '{"device_id":"d","account_uuid":"","session_id":"s"}'},
    "max_tokens": 100,
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "stream": True,
}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running_stack() as stack:
        stack.service.aliases = {"*"}  # the bodies name the models of their recordings
        with open_client(stack) as client:
            yield client


def open_client(stack: Stack) -> httpx.Client:
    headers = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
    return httpx.Client(base_url=stack.url, headers=headers, timeout=PATIENCE)


def test_there_are_bodies() -> None:
    assert len(BODIES) >= 8


@pytest.mark.parametrize("body", [*BODIES.values(), CLAUDE_CODE], ids=[*BODIES, "claude-code"])
def test_a_body_is_answered(client: httpx.Client, body: dict[str, Any]) -> None:
    answer = client.post("/v1/messages?beta=true", json=body | {"stream": False})
    whole = answer.json()
    if "thread" in body:  # the client sends the same again without it
        assert answer.status_code == 400
        assert whole["error"]["details"]["error_code"] == "thread_unsupported_request"
        return
    assert answer.status_code == 200, answer.text
    assert MessageObject.model_validate(whole).model_dump() == whole
    streamed = client.post("/v1/messages?beta=true", json=body | {"stream": True}).content
    # The id is each answer's own.
    assert joined(parsed(streamed)) | {"id": whole["id"]} == whole
