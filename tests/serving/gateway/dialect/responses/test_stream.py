"""An answer of the Responses API as a stream: its events, in OpenAI's order."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from serving.errors import EngineFailure, InvalidRequest, Overloaded, ServingError
from serving.gateway.dialect.responses import output
from serving.gateway.dialect.responses.stream import ResponseEvent, ResponsesEvents
from serving.proto import inference_pb2
from tests.serving.gateway.dialect.responses.test_request import request
from tests.serving.gateway.dialect.responses.test_response import (
    CALLED,
    IDENTITY,
    LENGTH,
    STOP,
    TOOL,
    WEATHER,
    calls,
    text,
    whole,
)

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
MESSAGE = "msg_" + "0" * 32


def parsed(written: bytes) -> list[dict[str, Any]]:
    """Returns the events in bytes, after openai's and our own types have read them."""
    assert written.isascii()
    events = []
    for block in written.decode().removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert EVENT.validate_python(event).type == event["type"]
        twin = ResponseEvent.model_validate(event)
        assert twin.model_dump(exclude_unset=True, by_alias=True) == event
        events.append(event)
    return events


def stream(*chunks: inference_pb2.GenerateChunk, **body: Any) -> list[dict[str, Any]]:
    """Returns the events that chunks make, each chunk written alone."""
    events = ResponsesEvents(IDENTITY, request(**body).repeated())
    written = events.opening(1) + b"".join(events.write([chunk]) for chunk in chunks)
    found = parsed(written + events.closing())
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_a_text() -> None:
    chunks = (inference_pb2.GenerateChunk(prompt_tokens=5), text("h\u00e9"), text("!"), STOP)
    events = stream(*chunks, tools=[TOOL])
    assert names(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    begun = events[0]["response"]
    assert (begun["status"], begun["output"], begun["usage"]) == ("in_progress", [], None)
    assert events[1]["response"] == begun
    place = {"item_id": f"{MESSAGE}_0", "output_index": 0, "content_index": 0}
    item = {"id": f"{MESSAGE}_0", "type": "message", "role": "assistant"}
    part = {"type": "output_text", "annotations": [], "logprobs": []}
    told = [{key: event[key] for key in event if key != "sequence_number"} for event in events]
    assert told[2:9] == [
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": item | {"status": "in_progress", "content": []},
        },
        {"type": "response.content_part.added", **place, "part": part | {"text": ""}},
        {"type": "response.output_text.delta", **place, "delta": "h\u00e9", "logprobs": []},
        {"type": "response.output_text.delta", **place, "delta": "!", "logprobs": []},
        {"type": "response.output_text.done", **place, "text": "h\u00e9!", "logprobs": []},
        {"type": "response.content_part.done", **place, "part": part | {"text": "h\u00e9!"}},
        {
            "type": "response.output_item.done",
            "output_index": 0,
            "item": item | {"status": "completed", "content": [part | {"text": "h\u00e9!"}]},
        },
    ]


@pytest.mark.parametrize(
    "chunks",
    [
        (text("hi"), STOP),
        (text("hi"), LENGTH),
        (LENGTH,),
        (text("I ask."), calls(WEATHER, WEATHER), CALLED),
        (calls(WEATHER), text("More."), calls(WEATHER), CALLED),
        (text("a", -1.0), text("b", -2.0), STOP),
    ],
)
def test_the_last_event_holds_the_answer_at_once(
    chunks: tuple[inference_pb2.GenerateChunk, ...],
) -> None:
    events = stream(*chunks)
    answer = whole(*chunks)
    assert events[-1]["response"] == answer
    assert events[-1]["type"] == f"response.{answer['status']}"
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == answer["output"]


def test_a_call() -> None:
    events = stream(text("I ask."), calls(WEATHER), CALLED)
    assert names(events)[5:] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    added, delta, done = events[8:11]
    assert (added["output_index"], added["item"]["arguments"]) == (1, "")
    assert (added["item"]["status"], added["item"]["call_id"]) == ("in_progress", "abcdefghi")
    assert delta["item_id"] == done["item_id"] == added["item"]["id"] == f"fc_{'0' * 32}_1"
    assert delta["delta"] == done["arguments"] == WEATHER.arguments
    assert done["name"] == "f"


def test_several_calls_have_places_of_their_own() -> None:
    events = stream(calls(WEATHER, WEATHER), CALLED)
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == [0, 1]
    assert len({event["item"]["id"] for event in added}) == 2


def test_a_cut_inside_a_call_tells_of_no_call() -> None:
    """The service sends no half call: the text before it is what was cut."""
    events = stream(text("I ask."), LENGTH)
    assert names(events)[-2:] == ["output_item.done", "incomplete"]
    assert events[-2]["item"]["status"] == "incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_logprobs_go_with_their_text() -> None:
    events = stream(text("a", -1.0), text("b", -2.0, -0.5), STOP)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    found = [[token["logprob"] for token in event["logprobs"]] for event in deltas]
    assert found == [[-1.0], [-2.0, -0.5]]
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert [token["logprob"] for token in done["logprobs"]] == [-1.0, -2.0, -0.5]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineFailure("broken"), "server_error"),
        (Overloaded("full"), "rate_limit_exceeded"),
        (InvalidRequest("too long"), "invalid_prompt"),
    ],
)
def test_a_failure_ends_the_stream_with_what_there_is(error: ServingError, code: str) -> None:
    events = ResponsesEvents(IDENTITY, request().repeated())
    events.opening(1)
    events.write([text("one")])
    (event,) = parsed(events.failure(error))
    assert event["type"] == "response.failed" and event["sequence_number"] == 5
    answer = event["response"]
    assert answer["error"] == {"code": code, "message": str(error)}
    assert (answer["status"], answer["usage"]) == ("failed", None)
    assert answer["output"][0]["content"][0]["text"] == "one"
    assert answer["output"][0]["status"] == "incomplete"


def test_an_answer_has_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "MAX_BYTES", 1000)
    events = ResponsesEvents(IDENTITY, {})
    with pytest.raises(InvalidRequest, match="more than 1,000 bytes"):
        events.write([text("x" * 1001)])


def test_a_heartbeat_is_a_comment_and_nothing_follows_the_last_event() -> None:
    events = ResponsesEvents(IDENTITY, {})
    assert events.heartbeat() == b": heartbeat\n\n"
    assert events.closing() == b""


CHUNKS = st.lists(
    st.one_of(
        st.text(min_size=1, max_size=6).map(text),
        st.tuples(st.text(min_size=1, max_size=4), st.floats(-50, 0, width=32)).map(
            lambda drawn: text(*drawn)
        ),
        st.builds(
            lambda name, arguments: calls(
                inference_pb2.ToolCall(id="abcdefghi", name=name, arguments=arguments)
            ),
            st.text(min_size=1, max_size=4),
            st.text(max_size=8),
        ),
    ),
    max_size=8,
)


@given(chunks=CHUNKS, end=st.sampled_from([STOP, LENGTH, CALLED]))
@settings(max_examples=60, deadline=None)
def test_any_answer_is_the_same_at_once_and_as_a_stream(
    chunks: list[inference_pb2.GenerateChunk], end: inference_pb2.GenerateChunk
) -> None:
    events = stream(*chunks, end)
    answer = whole(*chunks, end)
    assert events[-1]["response"] == answer
    told: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            told[event["output_index"]] = told.get(event["output_index"], "") + event["delta"]
    for index, item in enumerate(answer["output"]):
        is_message = item["type"] == "message"
        written = item["content"][0]["text"] if is_message else item["arguments"]
        assert told.get(index, "") == written
    spoken = "".join(chunk.text for chunk in chunks)
    messages = [item for item in answer["output"] if item["type"] == "message"]
    assert "".join(item["content"][0]["text"] for item in messages) == spoken
