"""Parameters of Anthropic's Messages API, and what they mean in the proto."""

import json
from typing import Any

import pytest

from serving.errors import InvalidParameter, Problem, UnsupportedParameter
from serving.gateway.dialect.anthropic.request import MessagesRequest
from serving.gateway.dialect.parsing import read, refuse_unknown
from serving.proto import inference_pb2

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {"const": "é"}}}
TEXT = '{"type":"object","properties":{"b":{},"a":{"const":"é"}}}'
TOOL = {"name": "f", "description": "does", "input_schema": SCHEMA}


def request(**body: Any) -> MessagesRequest:
    """Returns the request of a body."""
    given = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9} | body
    return read(json.dumps(given).encode(), MessagesRequest, refuse_unknown)


def asked(**body: Any) -> inference_pb2.GenerateRequest:
    """Returns the call of the service for a body."""
    (call,) = request(**body).protos()
    return call


def test_parameters() -> None:
    call = asked(temperature=0.5, top_p=0.25, top_k=3, stop_sequences=["x", ""], model="m")
    assert (call.max_tokens, list(call.stop), call.model) == (9, ["x"], "m")
    sampling = call.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 3)
    assert not asked().sampling.HasField("temperature")


@pytest.mark.parametrize(
    ("body", "path", "words"),
    [
        ({"max_tokens": None}, "max_tokens", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"temperature": 1.5}, "temperature", "less than or equal to 1"),
        ({"wine": "red"}, "wine", "Extra inputs are not permitted"),
        ({"stop": ["x"]}, "stop", "give stop_sequences"),
        ({"messages": []}, "messages", "at least 1"),
        ({"thinking": {"type": "deep"}}, "thinking.type", "'enabled'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "give tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice", "'g'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice", "name"),
        ({"tools": [TOOL, TOOL]}, "tools", "two tools"),
    ],
)
def test_what_is_wrong_is_named(body: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(InvalidParameter, match=words) as caught:
        request(**body)
    assert not isinstance(caught.value, UnsupportedParameter)
    assert ".".join(caught.value.problems[0].path[1:]) == path


def test_a_field_that_must_be_there() -> None:
    with pytest.raises(InvalidParameter, match="Field required") as caught:
        read(b'{"messages": [{"role": "user", "content": "a"}]}', MessagesRequest, refuse_unknown)
    assert caught.value.problems[0].path == ("body", "max_tokens")


def test_tools() -> None:
    chat = asked(tools=[TOOL | {"strict": True, "type": "custom", "cache_control": {}}]).chat
    tool = inference_pb2.Tool(name="f", description="does", parameters=TEXT, strict=True)
    assert list(chat.tools) == [tool]
    assert not chat.HasField("tool_choice") and not chat.HasField("parallel_tool_calls")


@pytest.mark.parametrize(
    ("choice", "mode", "allowed", "is_parallel"),
    [
        ({"type": "auto"}, "AUTO", [], None),
        ({"type": "auto", "disable_parallel_tool_use": True}, "AUTO", [], False),
        ({"type": "any", "disable_parallel_tool_use": False}, "REQUIRED", [], None),
        ({"type": "none"}, "NONE", [], None),
        ({"type": "tool", "name": "f"}, "REQUIRED", ["f"], False),
    ],
)
def test_the_choice_among_them(
    choice: dict[str, Any], mode: str, allowed: list[str], is_parallel: bool | None
) -> None:
    chat = asked(tools=[TOOL], tool_choice=choice).chat
    assert chat.tool_choice.mode == inference_pb2.ToolChoice.Mode.Value(f"MODE_{mode}")
    assert list(chat.tool_choice.allowed) == allowed
    assert (chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else None) == (
        is_parallel
    )


def test_forms_of_the_answer() -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    expected = inference_pb2.ResponseFormat(json_schema=TEXT)
    assert asked(output_config={"format": form}).response_format == expected
    assert asked(output_format=form).response_format == expected
    assert not asked(output_config={"effort": "high"}).HasField("response_format")
    with pytest.raises(InvalidParameter, match="leave one out"):
        request(output_config={"format": form}, output_format=form)


def test_parameters_of_this_servers_other_routes_are_taken() -> None:
    call = asked(seed=7, min_p=0.5, priority=1)
    assert (call.sampling.seed, call.sampling.min_p) == (7, 0.5)


@pytest.mark.parametrize(
    ("body", "service", "client"),
    [
        ({}, ("stop", "3"), ("stop_sequences", "3")),
        ({}, ("chat", "tools", "0", "parameters"), ("tools", "0", "input_schema")),
        ({}, ("chat", "messages", "4", "content"), ("messages",)),
        ({}, ("chat", "tool_choice"), ("tool_choice",)),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
            ("response_format", "json_schema"),
            ("output_config", "format", "schema"),
        ),
        (
            {"output_format": {"type": "json_schema", "schema": {}}},
            ("response_format", "json_schema"),
            ("output_format", "schema"),
        ),
    ],
)
def test_the_services_names_become_the_clients(
    body: dict[str, Any], service: tuple[str, ...], client: tuple[str, ...]
) -> None:
    refusal = InvalidParameter("m", [Problem("k", ("body", *service), "it is wrong", None)])
    renamed = request(**body).as_sent(refusal)
    assert isinstance(renamed, InvalidParameter)
    assert renamed.problems[0].path == ("body", *client)
