"""Tools that only OpenAI can run: refused by name, or left out and listed."""

import json
from typing import Any, get_args, get_type_hints

import pytest
from openai.types.responses import response_input_param, tool_param

from serving.errors import UnsupportedParameter
from serving.gateway.dialect.parsing import read
from serving.gateway.dialect.responses import items
from serving.gateway.dialect.responses.hosted_tools import (
    ITEM_TYPES,
    TOOL_TYPES,
    ResponsesFields,
)
from serving.gateway.dialect.responses.request import ResponsesRequest

FUNCTION = {"type": "function", "name": "f", "parameters": None}
SEARCH = {"type": "web_search"}


def ignoring(**body: Any) -> tuple[ResponsesRequest, dict[str, str]]:
    """Returns the request of a body whose hosted tools are left out, and the answer's headers."""
    fields = ResponsesFields(ignores_hosted_tools=True)
    given = {"input": "hello"} | body
    return read(json.dumps(given).encode(), ResponsesRequest, fields.apply), fields.headers


def types_of(kind: object) -> set[str]:
    """Returns the values of `type` in the members of a union of openai's types."""
    types: set[str] = set()
    for member in get_args(kind):
        types |= types_of(member)
    if isinstance(kind, type) and "type" in getattr(kind, "__annotations__", {}):
        types |= set(_texts(get_type_hints(kind)["type"]))
    return types


def _texts(hint: object) -> list[str]:
    found: list[str] = []
    for argument in get_args(hint):
        found += [argument] if isinstance(argument, str) else _texts(argument)
    return found


def test_every_type_of_tool_is_known() -> None:
    """A new version of openai's package may bring another one."""
    assert types_of(tool_param.ToolParam) - TOOL_TYPES == {"function"}


def test_every_type_of_item_is_known() -> None:
    known = types_of(response_input_param.ResponseInputItemParam)
    # What is kept at OpenAI, and what makes a long history short.
    refused = {"item_reference", "compaction", "compaction_trigger"}
    assert known - ITEM_TYPES - refused == set(items.ITEM_TYPES)


@pytest.mark.parametrize("kind", sorted(TOOL_TYPES | {"tomorrow"}))
def test_they_are_refused_by_name(kind: str) -> None:
    fields = ResponsesFields(ignores_hosted_tools=False)
    body = {"input": "hello", "tools": [FUNCTION, {"type": kind, "name": "x"}]}
    with pytest.raises(UnsupportedParameter, match=f"'{kind}' are not supported"):
        read(json.dumps(body).encode(), ResponsesRequest, fields.apply)
    assert fields.headers == {}


def test_they_are_left_out_and_listed() -> None:
    asked, headers = ignoring(tools=[SEARCH, FUNCTION, {"type": "mcp"}, SEARCH])
    assert [tool.name for tool in asked.tools or ()] == ["f"]
    assert headers == {"x-mixtral-ignored-tools": "web_search, mcp"}
    asked, headers = ignoring(tools=[SEARCH], tool_choice="auto")
    assert asked.tools == [] and headers == {"x-mixtral-ignored-tools": "web_search"}
    assert ignoring(tools=[FUNCTION])[1] == {}
    assert ignoring()[1] == {}


def test_their_calls_of_the_history_are_left_out_too() -> None:
    history = [
        {"role": "user", "content": "hello"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {}},
        {"role": "assistant", "content": "hi"},
    ]
    asked, headers = ignoring(input=history)
    assert [turn.content for turn in asked.protos()[0].chat.messages] == ["hello", "hi"]
    assert headers == {"x-mixtral-ignored-tools": "web_search_call"}


def test_a_choice_of_one_is_refused_all_the_same() -> None:
    with pytest.raises(UnsupportedParameter, match="tool_choice of type 'web_search'"):
        ignoring(tools=[SEARCH, FUNCTION], tool_choice=SEARCH)
    named = {"type": "function", "name": "f"}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [SEARCH, named]}
    asked, _ = ignoring(tools=[SEARCH, FUNCTION], tool_choice=choice)
    assert asked.tool_choice is not None and asked.tool_choice.allowed == ["f"]


@pytest.mark.parametrize("wrong", [7, {}, [7], [SEARCH] * 129, [{"type": ["x"]}]])
def test_what_is_no_list_of_tools_is_refused(wrong: object) -> None:
    with pytest.raises(Exception, match="tool|list|dictionary"):
        ignoring(tools=wrong)
