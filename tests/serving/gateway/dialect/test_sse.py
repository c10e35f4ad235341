"""Events of a stream: the bytes that are written by hand are those that their types would be."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from serving.errors import EngineFailure
from serving.gateway.dialect.chat.stream import ChatCompletionChunk, ChatEvents
from serving.gateway.dialect.chunks import Identity
from serving.gateway.dialect.fields import StreamUsage
from serving.gateway.dialect.sse import Events
from serving.gateway.dialect.text.response import TextCompletion
from serving.gateway.dialect.text.stream import TextEvents
from serving.proto import inference_pb2

IDENTITY = Identity(id="0" * 32, created=7, model='m"')
STOP = inference_pb2.FINISH_REASON_STOP
USAGE = inference_pb2.Usage(prompt_tokens=3, completion_tokens=2)
TOKEN = inference_pb2.TokenLogprob(token_id=9, token=b"\xc3", logprob=-0.5)


def events_of(written: bytes) -> list[dict[str, Any]]:
    assert written.endswith(b"\n\n") or not written
    return [json.loads(each.removeprefix(b"data: ")) for each in written.split(b"\n\n")[:-1]]


def chat(
    chunk: inference_pb2.GenerateChunk, stream_usage: StreamUsage = StreamUsage.LAST
) -> list[dict[str, Any]]:
    return events_of(ChatEvents(IDENTITY, stream_usage).write([chunk]))


def test_text_in_the_last_chunk_comes_before_the_end() -> None:
    text, end = chat(inference_pb2.GenerateChunk(text="!", finish_reason=STOP, usage=USAGE))
    assert text["choices"][0]["delta"] == {"content": "!"}
    assert text["choices"][0]["finish_reason"] is None
    assert "usage" not in text
    assert end["choices"][0]["delta"] == {"content": ""}
    assert end["choices"][0]["finish_reason"] == "stop"
    assert end["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_usage_that_was_asked_for_comes_alone() -> None:
    chunk = inference_pb2.GenerateChunk(finish_reason=STOP, usage=USAGE)
    end, usage = chat(chunk, StreamUsage.OWN)
    assert end["choices"][0]["finish_reason"] == "stop"
    assert "usage" not in end
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 5


def test_usage_that_is_not_wanted_is_nowhere() -> None:
    chunk = inference_pb2.GenerateChunk(text="!", finish_reason=STOP, usage=USAGE)
    assert all("usage" not in event for event in chat(chunk, StreamUsage.NONE))


@pytest.mark.parametrize("kind", [ChatEvents, TextEvents])
def test_each_chunk_has_what_is_spent_so_far(kind: type[Events]) -> None:
    """Two prompts of three and four tokens, of which the first has two choices; the last text comes
    with the end, so that the counts grow with each chunk."""
    chunks = [
        inference_pb2.GenerateChunk(prompt_tokens=3),
        inference_pb2.GenerateChunk(text="a", token_ids=[5]),
        inference_pb2.GenerateChunk(text="bc", token_ids=[6, 7], choice=1),
        inference_pb2.GenerateChunk(prompt_tokens=4),
        inference_pb2.GenerateChunk(text="d", token_ids=[8], finish_reason=STOP),
        inference_pb2.GenerateChunk(token_ids=[9], choice=1, finish_reason=STOP),
        inference_pb2.GenerateChunk(
            text="e",
            token_ids=[9],
            choice=2,
            finish_reason=STOP,
            usage=inference_pb2.Usage(prompt_tokens=7, completion_tokens=6),
        ),
    ]
    events = kind(IDENTITY, StreamUsage.ALL)
    opening = events_of(events.opening(1, 3))
    told = opening + events_of(events.write(chunks))
    spent = [(each["usage"]["prompt_tokens"], each["usage"]["completion_tokens"]) for each in told]
    begun = [(3, 0)] if kind is ChatEvents else []
    assert spent == [*begun, (3, 1), (3, 3), (7, 4), (7, 5), (7, 6), (7, 6)]
    assert told[-1]["choices"] == [] and all(each["choices"] for each in told[:-1])
    assert all(
        sum(pair) == each["usage"]["total_tokens"] for pair, each in zip(spent, told, strict=True)
    )


def test_the_last_text_of_a_completion_comes_with_its_end() -> None:
    chunk = inference_pb2.GenerateChunk(text="!", finish_reason=STOP, usage=USAGE)
    (end,) = events_of(TextEvents(IDENTITY).write([chunk]))
    assert (end["choices"][0]["text"], end["choices"][0]["finish_reason"]) == ("!", "stop")
    assert end["usage"]["total_tokens"] == 5


@pytest.mark.parametrize("kind", [ChatEvents, TextEvents])
@pytest.mark.parametrize(
    ("reason", "told"), [({}, None), ({"stop_text": "END"}, "END"), ({"stop_token_id": 0}, 0)]
)
def test_on_openais_paths_a_choice_tells_what_has_stopped_it(
    kind: type[Events], reason: dict[str, Any], told: object
) -> None:
    end = inference_pb2.GenerateChunk(finish_reason=STOP, **reason)
    chunks = [inference_pb2.GenerateChunk(text="a"), end]
    text, last = events_of(kind(replace(IDENTITY, is_openai=True)).write(chunks))
    assert last["choices"][0]["stop_reason"] == told
    assert "stop_reason" not in text["choices"][0]
    (azure,) = events_of(kind(IDENTITY).write([end]))
    assert "stop_reason" not in azure["choices"][0]


def test_a_choice_that_ends_before_others_has_no_usage() -> None:
    for stream_usage in (StreamUsage.LAST, StreamUsage.OWN, StreamUsage.NONE):
        (end,) = chat(inference_pb2.GenerateChunk(finish_reason=STOP, choice=2), stream_usage)
        assert end["choices"][0]["index"] == 2
        assert end["choices"][0]["finish_reason"] == "stop"
        assert "usage" not in end


def test_logprobs_of_tokens_without_text_come_with_the_end() -> None:
    (end,) = chat(inference_pb2.GenerateChunk(finish_reason=STOP, usage=USAGE, logprobs=[TOKEN]))
    assert end["choices"][0]["logprobs"] == {
        "content": [
            {"token": "\ufffd", "token_id": 9, "logprob": -0.5, "bytes": [195], "top_logprobs": []}
        ]
    }


def test_a_chunk_without_news_becomes_nothing() -> None:
    assert chat(inference_pb2.GenerateChunk(token_ids=[5])) == []


def test_each_call_comes_whole_in_one_delta_with_its_place() -> None:
    def called(*names: str) -> inference_pb2.GenerateChunk:
        calls = [
            inference_pb2.ToolCall(id=f"{name}" * 9, name=name, arguments='{"a":1}')
            for name in names
        ]
        return inference_pb2.GenerateChunk(tool_calls=calls, logprobs=[TOKEN], token_ids=[9])

    end = inference_pb2.GenerateChunk(
        finish_reason=inference_pb2.FINISH_REASON_TOOL_CALLS, usage=USAGE
    )
    chunks = [called("f"), called("g", "h"), end]
    *calls, last = events_of(ChatEvents(IDENTITY).write(chunks))
    assert [call["choices"][0]["delta"] for call in calls] == [
        {
            "content": "",
            "tool_calls": [
                {
                    "id": name * 9,
                    "type": "function",
                    "index": place,
                    "function": {"name": name, "arguments": '{"a":1}'},
                }
            ],
        }
        for place, name in enumerate("fgh")
    ]
    # The tokens of a chunk are told once.
    told = [call["choices"][0]["logprobs"] for call in calls]
    assert [each is not None for each in told] == [True, True, False]
    assert last["choices"][0]["delta"] == {"content": ""}
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert last["usage"]["total_tokens"] == 5


def test_calls_of_several_choices_are_counted_apart() -> None:
    events = ChatEvents(IDENTITY)
    for choice, place in ((0, 0), (1, 0), (1, 1), (0, 1)):
        call = inference_pb2.ToolCall(id="a", name="f")
        (event,) = events_of(
            events.write([inference_pb2.GenerateChunk(tool_calls=[call], choice=choice)])
        )
        assert event["choices"][0]["index"] == choice
        assert event["choices"][0]["delta"]["tool_calls"][0]["index"] == place


def test_offsets_of_a_text_go_on_from_chunk_to_chunk() -> None:
    events = TextEvents(IDENTITY)
    for choice, text, offset in ((0, "a", 0), (1, "bcd", 0), (0, "e", 1), (1, "f", 3)):
        one = inference_pb2.TokenLogprob(token=text.encode(), logprob=-1)
        chunk = inference_pb2.GenerateChunk(text=text, logprobs=[one], choice=choice)
        (event,) = events_of(events.write([chunk]))
        assert event["choices"][0]["logprobs"]["text_offset"] == [offset]


@pytest.mark.parametrize("kind", [ChatEvents, TextEvents])
@pytest.mark.parametrize("stream_usage", StreamUsage)
@settings(deadline=None)  # the first example builds the types
@given(
    text=st.text(),
    reason=st.sampled_from([0, STOP, inference_pb2.FINISH_REASON_TOOL_CALLS]),
    calls=st.lists(
        st.builds(inference_pb2.ToolCall, id=st.text(), name=st.text(), arguments=st.text()),
        max_size=2,
    ),
    has_usage=st.booleans(),
    logprobs=st.lists(st.floats(-100, 0, width=32), max_size=2),
    choice=st.integers(0, 3),
)
def test_every_event_is_what_its_type_says(
    kind: type[Events],
    stream_usage: StreamUsage,
    text: str,
    reason: inference_pb2.FinishReason,
    calls: list[inference_pb2.ToolCall],
    has_usage: bool,
    logprobs: list[float],
    choice: int,
) -> None:
    chunk = inference_pb2.GenerateChunk(
        text=text,
        finish_reason=reason,
        choice=choice,
        tool_calls=calls,
        usage=USAGE if has_usage else None,
        logprobs=[
            inference_pb2.TokenLogprob(token=b"a", logprob=each, top=[TOKEN]) for each in logprobs
        ],
    )
    events = kind(IDENTITY, stream_usage)
    shape: type[BaseModel] = ChatCompletionChunk
    if kind is TextEvents:
        shape = TextCompletion
    written = events.opening(2) + events.write([chunk, chunk]) + events.heartbeat()
    written += events.failure(EngineFailure("why"))
    assert written.isascii()
    for line in written.split(b"\n\n")[:-1]:
        assert len(line.splitlines()) == 1
        plain = line.removeprefix(b"data: ")
        again = shape.model_validate_json(plain).model_dump()
        # Order counts too; a float may be written in more ways than one.
        assert json.dumps(again) == json.dumps(json.loads(plain))
