"""What clients have sent to the Responses API is answered, and openai's types read the answers."""

import json
from typing import Any

import httpx
import pytest
from openai.types.responses import Response

from tests.serving.gateway.dialect.responses.test_stream import parsed
from tests.support.client_envs import CLIENTS
from tests.support.fakes import PATIENCE, Stack, running_stack
from tests.support.gateway import BEARER

BODIES = {
    f"{path.stem} {number} {sent['call']}": sent["body"]
    for path in sorted((CLIENTS / "bodies").glob("*.jsonl"))
    for number, sent in enumerate(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
    if sent.get("path", "").endswith("/responses")
}


@pytest.fixture(scope="module")
def stack() -> Any:
    with running_stack() as stack:
        stack.service.aliases = {"*"}  # the bodies name the models of their recordings
        yield stack


def test_there_are_bodies() -> None:
    assert len(BODIES) >= 15


@pytest.mark.parametrize("name", BODIES)
def test_a_body_is_answered(stack: Stack, name: str) -> None:
    """At once and as a stream, with the parameters repeated as they were sent."""
    sent = BODIES[name]
    with httpx.Client(base_url=stack.url, headers=BEARER, timeout=PATIENCE) as client:
        answer = client.post("/v1/responses", json=sent | {"stream": False})
        assert answer.status_code == 200, answer.text
        streamed = client.post("/v1/responses", json=sent | {"stream": True}).content
    whole = answer.json()
    read = Response.model_validate(whole)
    assert read.output_text and read.status in ("completed", "incomplete")
    events = parsed(streamed)
    last = events[-1]["response"]
    # Ids and times are each answer's own.
    assert without_ids(last) == without_ids(whole)
    for field in ("max_output_tokens", "temperature", "instructions"):
        assert whole[field] == sent.get(field)
    assert whole["text"]["format"] == sent.get("text", {}).get("format", {"type": "text"})
    given = [tool | {"strict": tool.get("strict")} for tool in sent.get("tools", [])]
    assert whole["tools"] == given
    assert whole["tool_choice"] == sent.get("tool_choice", "auto")


def without_ids(answer: dict[str, Any]) -> dict[str, Any]:
    """Returns an answer without its id, its items' ids and its time."""
    items = [{key: item[key] for key in item if key != "id"} for item in answer["output"]]
    return {key: answer[key] for key in answer if key not in ("id", "created_at")} | {
        "output": items
    }
