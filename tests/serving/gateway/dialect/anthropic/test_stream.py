"""An answer of Anthropic's Messages API as a stream: its events, in Anthropic's order."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import EngineFailure, Overloaded, ServingError, Unavailable
from serving.gateway.dialect.anthropic.stream import MessageEvent, MessagesEvents
from serving.proto import inference_pb2
from tests.serving.gateway.dialect.anthropic.test_response import (
    IDENTITY,
    QUEUED,
    Chunk,
    call,
    end,
    whole,
)

Event = dict[str, Any]


def parsed(written: bytes) -> list[Event]:
    """Returns the events in bytes, after our own type has read them."""
    assert written.isascii()
    events = []
    for block in written.decode().removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        twin = MessageEvent.model_validate(event).model_dump(exclude_unset=True)
        if event["type"] == "message_start":  # its null must be there
            assert twin["message"].keys() == event["message"].keys()
        else:
            assert twin == event
        events.append(event)
    return events


def stream(*chunks: inference_pb2.GenerateChunk) -> list[Event]:
    """Returns the events that chunks make, each chunk written alone."""
    events = MessagesEvents(IDENTITY, 3)
    written = events.opening(1) + b"".join(events.write([chunk]) for chunk in chunks)
    return parsed(written + events.closing())


def joined(events: list[Event]) -> dict[str, Any]:
    """Returns the message that a client puts together."""
    message: dict[str, Any] = events[0]["message"]
    pieces: list[str] = []
    for event in events[1:]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
                pieces = []
            case "content_block_delta":
                pieces.append(event["delta"].get("text", event["delta"].get("partial_json")))
            case "content_block_stop":
                assert event["index"] == len(message["content"]) - 1
                block = message["content"][-1]
                if block["type"] == "text":
                    block["text"] = "".join(pieces)
                else:
                    block["input"] = json.loads("".join(pieces))
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
    return message


def test_a_text() -> None:
    events = stream(QUEUED, Chunk(computed_tokens=4), Chunk(text="h\u00e9"), Chunk(text="!"), end())
    assert [event["type"] for event in events] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["usage"]["input_tokens"] == 5
    assert (events[0]["message"]["content"], events[0]["message"]["stop_reason"]) == ([], None)
    assert events[3]["delta"] == {"type": "text_delta", "text": "h\u00e9"}
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"] == {
        "input_tokens": 3,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 2,
        "output_tokens": 3,
    }


def test_what_is_cached_is_told_at_the_start_where_it_is_known() -> None:
    events = MessagesEvents(IDENTITY, 3)
    (started, *_) = parsed(events.write([QUEUED, Chunk(computed_tokens=4, cached_tokens=2)]))
    usage = started["message"]["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (3, 2)


def test_a_call_is_a_block_of_its_own() -> None:
    events = stream(QUEUED, Chunk(text="one"), call("aaaaaaaaa", '{"a":1}'), end("TOOL_CALLS"))
    assert [event["type"].removeprefix("content_block_") for event in events[2:9]] == [
        *("start", "delta", "stop", "start", "delta", "stop", "message_delta"),
    ]
    assert events[5]["content_block"] == {
        "type": "tool_use",
        "id": "toolu_aaaaaaaaa",
        "name": "f",
        "input": {},
    }
    assert events[6]["delta"] == {"type": "input_json_delta", "partial_json": '{"a":1}'}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (EngineFailure("why"), "api_error"),
        (Overloaded("why"), "rate_limit_error"),
        (Unavailable("why"), "overloaded_error"),
    ],
)
def test_a_failure_is_an_event(error: ServingError, kind: str) -> None:
    events = MessagesEvents(IDENTITY, 3)
    assert parsed(events.failure(error)) == [
        {
            "type": "error",
            "error": {"type": kind, "message": "why"},
            "request_id": "req_" + "0" * 32,
        }
    ]


def test_a_heartbeat_is_a_ping() -> None:
    assert MessagesEvents(IDENTITY, 3).heartbeat() == b'event: ping\ndata: {"type":"ping"}\n\n'


TEXTS = st.text(st.characters(codec="utf-8"), max_size=5).map(lambda text: Chunk(text=text))
CALLS = st.builds(
    call, st.just("aaaaaaaaa"), st.dictionaries(st.text(), st.integers()).map(json.dumps)
)


@settings(deadline=None)
@given(st.lists(TEXTS | CALLS, max_size=6))
def test_a_stream_says_what_the_answer_at_once_says(
    chunks: list[inference_pb2.GenerateChunk],
) -> None:
    assert joined(stream(QUEUED, *chunks, end())) == whole(QUEUED, *chunks, end())
