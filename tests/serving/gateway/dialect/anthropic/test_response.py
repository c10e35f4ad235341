"""An answer of Anthropic's Messages API at once."""

import json
from typing import Any

import pytest

from serving.gateway.dialect.anthropic.response import MessageObject, MessagesAnswer
from serving.gateway.dialect.chunks import Identity
from serving.proto import inference_pb2

IDENTITY = Identity("msg_" + "0" * 32, 7, "mixtral \U0001f600")
Chunk = inference_pb2.GenerateChunk
USAGE = inference_pb2.Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=2)
QUEUED = Chunk(prompt_tokens=5)


def end(reason: str = "STOP", **fields: Any) -> inference_pb2.GenerateChunk:
    """Returns the last chunk of an answer."""
    number = inference_pb2.FinishReason.Value(f"FINISH_REASON_{reason}")
    return Chunk(finish_reason=number, usage=USAGE, **fields)


def call(call_id: str, arguments: str) -> inference_pb2.GenerateChunk:
    """Returns a chunk with a call of a tool."""
    return Chunk(tool_calls=[inference_pb2.ToolCall(id=call_id, name="f", arguments=arguments)])


def whole(*chunks: inference_pb2.GenerateChunk, max_tokens: int = 3) -> dict[str, Any]:
    """Returns the answer that chunks make, after our own type has read it."""
    answer = MessagesAnswer(IDENTITY, max_tokens)
    for chunk in chunks:
        answer.add([chunk])
    written: dict[str, Any] = json.loads(b"".join(answer.pieces()))
    assert MessageObject.model_validate(written).model_dump() == written
    return written


def test_a_text() -> None:
    assert whole(QUEUED, Chunk(text='h\u00e9"'), Chunk(text="\U0001f600"), end()) == {
        "id": "msg_" + "0" * 32,
        "type": "message",
        "role": "assistant",
        "model": "mixtral \U0001f600",
        "content": [{"type": "text", "text": 'h\u00e9"\U0001f600'}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 2,
            "output_tokens": 3,
        },
    }


def test_calls_stand_between_texts() -> None:
    answer = whole(
        Chunk(text="one"),
        call("aaaaaaaaa", '{"a": [1, "\u00e9"]}'),
        call("bbbbbbbbb", ""),
        Chunk(text="two"),
        end("TOOL_CALLS"),
    )
    assert answer["content"] == [
        {"type": "text", "text": "one"},
        {"type": "tool_use", "id": "toolu_aaaaaaaaa", "name": "f", "input": {"a": [1, "\u00e9"]}},
        {"type": "tool_use", "id": "toolu_bbbbbbbbb", "name": "f", "input": {}},
        {"type": "text", "text": "two"},
    ]
    assert answer["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("last", "max_tokens", "reason", "sequence"),
    [
        (end(), 3, "end_turn", None),
        (end("LENGTH"), 3, "max_tokens", None),
        (end("LENGTH"), 4, "model_context_window_exceeded", None),
        (end(stop_text="\n"), 9, "stop_sequence", "\n"),
        (end("LENGTH", stop_text="x"), 9, "stop_sequence", "x"),  # it cut a form
        (end(stop_token_id=7), 9, "end_turn", None),
        (end("LENGTH", stop_token_id=7), 9, "max_tokens", None),
    ],
)
def test_why_an_answer_ended(
    last: inference_pb2.GenerateChunk, max_tokens: int, reason: str, sequence: str | None
) -> None:
    answer = whole(last, max_tokens=max_tokens)
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    assert answer["content"] == []
