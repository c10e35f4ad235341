"""The table of the wire in docs/wire.md: each of its cells is read off the recorded answers.

The records in tests/golden/wire are what the gateway answers now, to the byte; what a cell says is
worked out from them here, and must be what the page says.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import Stack, running_stack
from tests.support.wire import ROUTES, beating_record, is_beat, kept, records, written

PAGE = Path(__file__).parents[3] / "docs" / "wire.md"
Records = dict[str, str]


@pytest.fixture(scope="module")
def beating() -> Iterator[Stack]:
    with running_stack(heartbeat_seconds=0.01) as stack:
        yield stack


@pytest.mark.parametrize("name", ROUTES)
def test_answers_are_those_that_are_recorded(name: str, stack: Stack, beating: Stack) -> None:
    answers = records(stack, ROUTES[name]) | beating_record(beating, ROUTES[name])
    assert answers == kept(name), "python -m tests.support.wire writes the records anew"
    assert written(answers) == written(kept(name))


def whole(record: str) -> tuple[int, dict[str, Any]]:
    """Returns the status and the body of an answer at once."""
    head, _, body = record.partition("\n")
    status, kind = head.split(" ")
    assert kind == "application/json"
    return int(status), json.loads(body)


def events(record: str) -> list[str]:
    """Returns the events of a stream."""
    head, _, body = record.partition("\n")
    assert head == "200 text/event-stream"
    return body.strip("\n").split("\n\n")


def data(event: str) -> dict[str, Any]:
    """Returns the object of an event."""
    found: dict[str, Any] = json.loads(event.rpartition("data: ")[2])
    return found


def errors(told: Records) -> str:
    status, body = whole(told["error"])
    too_long, inner = whole(told["too long"])
    if "type" in inner:  # Anthropic's API has no codes
        assert (too_long, inner["error"]["type"]) == (400, "invalid_request_error")
        keys = ", ".join(f"`{key}`" for key in body["error"])
        return f"{status}, `type: error`, `error` with {keys}, and `request_id`"
    assert (too_long, inner["error"]["code"]) == (400, "context_length_exceeded")
    keys = ", ".join(f"`{key}`" for key in body["error"])
    return f"{status}, `error` with {keys}" + (", and `detail`" if "detail" in body else "")


def ids(told: Records) -> str:
    own = {whole(told["whole"])[1]["id"]}
    for event in events(told["stream"]):
        if event.endswith("[DONE]"):
            continue
        found = data(event)
        found = found.get("message", found)
        own |= {found["response"]["id"]} if "response" in found else {found.get("id", *own)}
    (one,) = own
    prefix = one.removesuffix("ID")
    return f"`{prefix}` and 32 hex digits" if prefix else "32 hex digits"


def usage(told: Records) -> str:
    counts = whole(told["whole"])[1]["usage"]
    if "cache_read_input_tokens" in counts:
        (first, last) = (data(event) for event in events(told["stream"]) if '"usage":{' in event)
        assert first["message"]["usage"]["input_tokens"] == last["usage"]["input_tokens"] == 1
        names = ", ".join(f"`{key}`" for key in counts)
        return f"{names}; in a stream in `{first['type']}` and `{last['type']}`"
    total = [key for key in counts if not key.endswith("_details")]
    assert counts[total[0]] + counts[total[1]] == counts[total[2]] == 3
    names = ", ".join(f"`{key}`" for key in total)
    with_usage = [data(event) for event in events(told["stream"]) if '"usage":{' in event]
    (last,) = with_usage
    if "response" in last:
        return f"{names}; in a stream in `{last['type']}`"
    assert last["choices"][0]["finish_reason"] == "stop"
    (alone,) = (data(event) for event in events(told["usage"]) if '"usage":{' in event)
    assert alone["choices"] == []
    return f"{names}; in a stream in the last chunk, with `include_usage` in one after it"


def heartbeat(told: Records) -> str:
    (beat,) = {event for event in events(told["heartbeat"]) if is_beat(event)}
    if beat.startswith("event:"):
        return f"the event `{data(beat)['type']}`"
    if beat.startswith(":"):
        return "a comment"
    assert data(beat)["choices"] == []
    return "a chunk with `choices: []`"


def calls(told: Records) -> str:
    if "calls" not in told:
        return "-"
    body = whole(told["calls"])[1]
    if "output" in body:
        assert [item["type"] for item in body["output"]] == ["function_call"] * 2
        return "items `function_call`"
    if "stop_reason" in body:
        assert [block["type"] for block in body["content"]] == ["tool_use"] * 2
        assert [block["input"] for block in body["content"]] == [{"a": 1}, {}]
        return f"blocks `tool_use`, `stop_reason: {body['stop_reason']}`"
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "" and choice["finish_reason"] == "tool_calls"
    assert [call["index"] for call in choice["message"]["tool_calls"]] == [0, 1]
    return '`tool_calls` beside `content: ""`, `finish_reason: tool_calls`'


def streamed_calls(told: Records) -> str:
    if "calls stream" not in told:
        return "-"
    found = [data(event) for event in events(told["calls stream"]) if not event.endswith("[DONE]")]
    if "type" in found[0]:
        kinds = [each["type"].removeprefix("response.") for each in found]
        if "content_block_delta" in kinds:
            (first, second) = (
                each["delta"] for each in found if each["type"] == "content_block_delta"
            )
            assert (first["partial_json"], second["partial_json"]) == ('{"a":1}', "{}")
            return f"each whole in one `{first['type']}`"
        assert kinds.count("function_call_arguments.delta") == 2
        return "`function_call_arguments.delta` and `.done`"
    deltas = [each["choices"][0]["delta"].get("tool_calls", []) for each in found]
    assert [len(delta) for delta in deltas] == [0, 1, 1, 0]
    assert all(json.loads(call["function"]["arguments"]) is not None for (call,) in deltas[1:3])
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"
    return "each whole in one delta"


def end(told: Records) -> str:
    last = events(told["stream"])[-1]
    return "`[DONE]`" if last == "data: [DONE]" else f"`{data(last)['type']}`"


def cut(told: Records) -> str:
    body = whole(told["cut"])[1]
    finals = [data(event) for event in events(told["cut stream"]) if '"usage":{' in event]
    if "choices" in body:
        reasons = {answer["choices"][0]["finish_reason"] for answer in (body, *finals)}
        assert reasons == {"length"}
        return "`finish_reason: length`"
    if "stop_reason" in body:
        assert body["stop_reason"] == finals[-1]["delta"]["stop_reason"]
        return f"`stop_reason: {body['stop_reason']}`"
    assert body["status"] == finals[0]["response"]["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    return "`status: incomplete`"


def broken(told: Records) -> str:
    *_, last, closed = events(told["broken"])
    assert closed == "(broken off)" and "[DONE]" not in told["broken"]
    event = data(last)
    if event.get("type") == "error":
        return "the event `error`, then the connection breaks off"
    if "type" in event:
        return f"`{event['type']}`, then the connection breaks off"
    assert event["choices"] == [] and event["error"]["message"]
    return "a chunk with `error`, then the connection breaks off"


ROWS: list[Callable[[Records], str]] = [
    *(errors, ids, usage, heartbeat, calls, streamed_calls, end, cut, broken),
]


def table() -> dict[str, list[str]]:
    """Returns the columns of the page's first table: the cells by the head, which has the paths."""
    section = PAGE.read_text(encoding="utf-8").partition("## Routes")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    lines = [row.strip("| ").split(" | ") for row in rows]
    return {column[0]: list(column[1:]) for column in zip(*lines, strict=True)}


@pytest.mark.parametrize("name", ROUTES)
def test_each_cell_is_what_the_records_say(name: str) -> None:
    told = kept(name)
    route = ROUTES[name]
    (cells,) = (cells for head, cells in table().items() if f"`{route.path}`" in head.split(", "))
    assert cells == [row(told) for row in ROWS]


@pytest.mark.parametrize(
    ("name", "path", "extra"),
    [(name, path, extra) for name, route in ROUTES.items() for path, extra in route.others],
)
def test_other_paths_of_a_column_answer_with_the_same_bytes(
    name: str, path: str, extra: dict[str, Any], stack: Stack
) -> None:
    other = replace(ROUTES[name], path=path, extra=extra)
    assert records(stack, other) == {
        name: answer for name, answer in kept(name).items() if name != "heartbeat"
    }
