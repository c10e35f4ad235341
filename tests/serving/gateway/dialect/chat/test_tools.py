"""Tools of a chat: what each vendor's forms become in the proto, and what is refused."""

from typing import Any

import pytest

from serving.errors import InvalidParameter, UnsupportedParameter
from serving.proto import inference_pb2 as pb
from tests.support.chats import PASS, asked

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
TEXT = '{"type":"object","properties":{"b":{},"a":{}}}'
F: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
G: dict[str, Any] = {"type": "function", "function": {"name": "g"}}


def tools(*given: object) -> list[pb.Tool]:
    return list(asked(tools=list(given)).chat.tools)


def test_the_parts_of_a_tool() -> None:
    function = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
    expected = pb.Tool(name="f", description="d", parameters=TEXT, strict=True)
    assert tools({"type": "function", "function": function}) == [expected]
    # Mistral's clients may leave the type out, and LangChain has `strict` beside the function.
    function["strict"] = None
    assert tools({"function": function, "strict": True}) == [expected]
    assert tools(F, G) == [pb.Tool(name="f"), pb.Tool(name="g")]
    assert tools({"function": {"name": "clock-Now", "parameters": {}}})[0].parameters == "{}"


@pytest.mark.parametrize(
    ("choice", "mode", "allowed"),
    [
        ("auto", "AUTO", []),
        ("none", "NONE", []),
        ("required", "REQUIRED", []),
        ("any", "REQUIRED", []),
        (F, "REQUIRED", ["f"]),
        ({"function": {"name": "f", "arguments": {}}}, "REQUIRED", ["f"]),
        ({"type": "function", "name": "f"}, "REQUIRED", ["f"]),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [F, G]}},
            "AUTO",
            ["f", "g"],
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [G]}},
            "REQUIRED",
            ["g"],
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"name": "g"}]},
            "REQUIRED",
            ["g"],
        ),
    ],
)
def test_choices(choice: object, mode: str, allowed: list[str]) -> None:
    chat = asked(tools=[F, G], tool_choice=choice).chat
    assert pb.ToolChoice.Mode.Name(chat.tool_choice.mode) == f"MODE_{mode}"
    assert chat.tool_choice.allowed == allowed


def test_a_choice_that_is_left_out_stays_absent() -> None:
    for choice in ({}, {"tool_choice": None}):
        chat = asked(tools=[F], **choice).chat
        assert not chat.HasField("tool_choice")
        assert not chat.HasField("parallel_tool_calls")
    assert asked(tools=[], tool_choice="none") == asked(tools=None, tool_choice="auto") == asked()


@pytest.mark.parametrize("given", [None, True, False])
def test_a_function_that_is_named_is_called_once(given: bool | None) -> None:
    for choice, expected in (("required", given), (F, False)):
        chat = asked(PASS, tools=[F], tool_choice=choice, parallel_tool_calls=given).chat
        told = chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else None
        assert told == expected


@pytest.mark.parametrize(
    ("parameters", "path"),
    [
        ({"tools": [{}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools.0.function"),
        ({"tools": [{"function": {}}]}, "tools.0.function.name"),
        ({"tools": [{"function": {"name": ""}}]}, "tools.0.function.name"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"function": {"name": "a\n"}}]}, "tools.0.function.name"),
        ({"tools": [{"function": {"name": "a" * 65}}]}, "tools.0.function.name"),
        (
            {"tools": [{"function": {"name": "f", "parameters": "{}"}}]},
            "tools.0.function.parameters",
        ),
        ({"tools": [F, G, F]}, "tools"),
        ({"tools": [F] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [F], "tool_choice": "perhaps"}, "tool_choice.mode"),
        ({"tools": [F], "tool_choice": 5}, "tool_choice"),
        ({"tools": [F], "tool_choice": {"function": {}}}, "tool_choice"),
        ({"tools": [F], "tool_choice": G}, "tool_choice"),
        ({"tool_choice": F}, "tool_choice"),
        (
            {
                "tools": [F],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [G]}},
            },
            "tool_choice",
        ),
        (
            {"tools": [F], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
            "tool_choice",
        ),
    ],
)
def test_mistakes_are_named(parameters: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        asked(**parameters)
    assert type(caught.value) is InvalidParameter
    assert [".".join(problem.path) for problem in caught.value.problems] == [f"body.{path}"]


def test_an_unknown_name_and_a_double_one_are_told() -> None:
    with pytest.raises(InvalidParameter, match="'g', which is not among the tools"):
        asked(tools=[F], tool_choice=G)
    with pytest.raises(InvalidParameter, match="two tools with the name 'f'"):
        asked(tools=[F, F])


@pytest.mark.parametrize(
    ("parameters", "path"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [F], "tool_choice": {"type": "custom", "custom": {}}}, "tool_choice"),
    ],
)
def test_other_kinds_of_tools_are_named(parameters: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        asked(**parameters)
    assert f"body.{path}" in [".".join(problem.path) for problem in caught.value.problems]
    assert UnsupportedParameter.azure_code in [problem.kind for problem in caught.value.problems]
