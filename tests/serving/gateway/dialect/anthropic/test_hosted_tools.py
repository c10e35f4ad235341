"""Anthropic's own tools in requests: refused by name, or left out where the operator says so."""

import json
from typing import Any

import pytest

from serving.errors import InvalidParameter, UnsupportedParameter
from serving.gateway.dialect.anthropic.hosted_tools import MessagesFields
from serving.gateway.dialect.anthropic.request import MessagesRequest
from serving.gateway.dialect.parsing import read

TOOL = {"name": "f", "input_schema": {"type": "object"}}
HELLO = {"role": "user", "content": "hello"}
# Types of all tools in Anthropic's package of 2026-11.
TYPES = [
    *("bash_20250124", "browser_toolset_20260801", "code_execution_20260521"),
    *("computer_20251124", "computer_toolset_20260801", "mcp_toolset", "memory_20250818"),
    *("advisor_20260301", "text_editor_20250728", "tool_search_tool_bm25_20251119"),
    *("tool_search_tool_regex_20251119", "web_fetch_20260318", "web_search_20260318"),
]


def request(*, ignores: bool, **body: Any) -> tuple[MessagesRequest, dict[str, str]]:
    """Returns the request of a body, and the headers of its answer."""
    fields = MessagesFields(ignores_hosted_tools=ignores)
    given = {"messages": [HELLO], "max_tokens": 9} | body
    return read(json.dumps(given).encode(), MessagesRequest, fields.apply), fields.headers


@pytest.mark.parametrize("kind", TYPES)
def test_a_tool_is_refused_by_name_or_left_out(kind: str) -> None:
    tools = [TOOL, {"type": kind, "name": "g"}]
    with pytest.raises(UnsupportedParameter, match=f"'{kind}'.*--ignore-hosted-tools"):
        request(ignores=False, tools=tools)
    asked, headers = request(ignores=True, tools=tools)
    assert [tool.name for tool in asked.tools or ()] == ["f"]
    assert headers == {"x-mixtral-ignored-tools": kind}


def test_blocks_of_such_tools_are_left_out_too() -> None:
    used = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    found = {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}
    result = {
        "type": "tool_result",
        "tool_use_id": "t",
        "content": [{"type": "tool_reference", "tool_name": "f"}, {"type": "text", "text": "x"}],
    }
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    turns = [
        HELLO,
        {"role": "assistant", "content": [used, found, {"type": "text", "text": "so"}, call]},
        {"role": "user", "content": [result]},
    ]
    with pytest.raises(UnsupportedParameter, match="'server_tool_use'"):
        request(ignores=False, messages=turns)
    asked, headers = request(ignores=True, messages=turns)
    chat = asked.chat()
    assert [(turn.role, turn.content) for turn in chat.messages] == [
        ("user", "hello"),
        ("assistant", "so"),
        ("tool", "x"),
    ]
    assert headers["x-mixtral-ignored-tools"] == (
        "server_tool_use, web_search_tool_result, tool_reference"
    )


@pytest.mark.parametrize("ignores", [False, True])
def test_all_else_is_refused_in_either_case(ignores: bool) -> None:
    for body in (
        {"wine": "red"},
        {"tools": [{"type": "wine", "name": "f"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": ["x"]},
        {"messages": "x"},
        {"messages": [{"role": "user"}]},
        {"messages": [HELLO] * 5000},
        {"tools": "x"},
    ):
        with pytest.raises(InvalidParameter):
            request(ignores=ignores, **body)
    asked, headers = request(ignores=ignores)
    assert asked.tools is None and headers == {}


@pytest.mark.parametrize("kind", ["bash_\r\nset-cookie: a=b", "bash_\N{SNOWMAN}", "bash_" * 13])
def test_a_type_that_no_header_can_tell_is_refused(kind: str) -> None:
    """It is the client's text, and not one of Anthropic's."""
    with pytest.raises(UnsupportedParameter, match="tools of type 'bash_"):
        request(ignores=True, tools=[TOOL, {"type": kind, "name": "g"}])


def test_the_header_is_bounded() -> None:
    tools = [{"type": f"bash_{number:059}", "name": "g"} for number in range(100)]
    _, headers = request(ignores=True, tools=tools)
    assert len(headers["x-mixtral-ignored-tools"]) == 1024
