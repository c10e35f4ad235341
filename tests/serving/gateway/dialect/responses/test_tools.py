"""Functions in the flat form of the Responses API, and the choice among them."""

from typing import Any

import pytest

from serving.errors import InvalidParameter, ServingError, UnsupportedParameter
from serving.proto import inference_pb2
from tests.serving.gateway.dialect.responses.test_request import asked, request

F: dict[str, Any] = {
    "type": "function",
    "name": "f",
    "description": "It does.",
    "parameters": {"type": "object", "properties": {}},
    "strict": True,
}
G: dict[str, Any] = {"type": "function", "name": "g"}


def test_functions() -> None:
    (call,) = asked(tools=[F, G])
    schema = '{"type":"object","properties":{}}'
    assert list(call.chat.tools) == [
        inference_pb2.Tool(name="f", description="It does.", parameters=schema, strict=True),
        inference_pb2.Tool(name="g"),
    ]
    assert not call.chat.HasField("tool_choice")
    assert not call.chat.HasField("parallel_tool_calls")
    (call,) = asked(tools=[F], parallel_tool_calls=False)
    assert call.chat.parallel_tool_calls is False and call.chat.HasField("parallel_tool_calls")


@pytest.mark.parametrize(
    ("choice", "mode", "allowed"),
    [
        ("auto", "MODE_AUTO", []),
        ("none", "MODE_NONE", []),
        ("required", "MODE_REQUIRED", []),
        ({"type": "function", "name": "g"}, "MODE_REQUIRED", ["g"]),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            "MODE_AUTO",
            ["f"],
        ),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": name} for name in "fg"],
            },
            "MODE_REQUIRED",
            ["f", "g"],
        ),
    ],
)
def test_choices_are_read_and_repeated(choice: Any, mode: str, allowed: list[str]) -> None:
    given = request(tools=[F, G], tool_choice=choice)
    (call,) = given.protos()
    assert inference_pb2.ToolChoice.Mode.Name(call.chat.tool_choice.mode) == mode
    assert list(call.chat.tool_choice.allowed) == allowed
    assert given.repeated()["tool_choice"] == choice


@pytest.mark.parametrize(
    ("parameters", "kind", "text"),
    [
        ({"tools": [F, F]}, InvalidParameter, "two tools with the name 'f'"),
        ({"tools": [{"type": "function"}]}, InvalidParameter, "Field required"),
        ({"tools": [F | {"name": "no spaces"}]}, InvalidParameter, "match pattern"),
        ({"tools": [F | {"parameters": []}]}, InvalidParameter, "valid string|JSON object"),
        ({"tools": [F | {"defer_loading": True}]}, UnsupportedParameter, "defer_loading"),
        ({"tools": [F | {"allowed_callers": ["programmatic"]}]}, UnsupportedParameter, "callers"),
        ({"tools": [F], "tool_choice": {"type": "function", "name": "h"}}, InvalidParameter, "'h'"),
        ({"tool_choice": "required"}, InvalidParameter, "there are no tools"),
        ({"tools": [F], "tool_choice": "sometimes"}, InvalidParameter, "'required'"),
        ({"tools": [F], "tool_choice": {"type": "mcp"}}, UnsupportedParameter, "'mcp'"),
    ],
)
def test_what_is_refused(parameters: dict[str, Any], kind: type[ServingError], text: str) -> None:
    with pytest.raises(kind, match=text) as raised:
        asked(**parameters)
    assert type(raised.value) is kind
