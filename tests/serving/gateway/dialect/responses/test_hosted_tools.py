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
TEXT = {"type": "input_text"}


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


def test_a_body_like_codexs() -> None:
    asked, headers = ignoring(
        model="azureai",
        instructions="You are a coding agent.",
        input=[
            {"type": "message", "role": "developer", "content": [TEXT | {"text": "Sandbox: on."}]},
            {"type": "message", "role": "user", "content": [TEXT | {"text": "<environment>"}]},
            {"type": "message", "role": "user", "content": [TEXT | {"text": "List the files."}]},
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "x"},
            {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "call_1"},
            {"type": "function_call_output", "call_id": "call_1", "output": "a.txt"},
            {"type": "custom_tool_call", "name": "apply_patch", "input": "*", "call_id": "c2"},
            {"type": "custom_tool_call_output", "call_id": "c2", "output": "done"},
        ],
        tools=[
            FUNCTION | {"strict": False, "description": "Runs a command."},
            {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
            {"type": "web_search", "external_web_access": False},
        ],
        tool_choice="auto",
        parallel_tool_calls=True,
        reasoning={"effort": "medium", "summary": "auto"},
        store=False,
        stream=True,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="thread",
        text={"verbosity": "low"},
        client_metadata={"x-codex-installation-id": "1"},
    )
    assert headers["x-mixtral-ignored-tools"] == (
        "custom, web_search, custom_tool_call, custom_tool_call_output"
    )
    (call,) = asked.protos()
    assert [tool.name for tool in call.chat.tools] == ["f"]
    assert [turn.role for turn in call.chat.messages] == [
        *("system", "user", "user", "assistant", "tool"),
    ]
    assert call.chat.messages[0].content == "You are a coding agent.\n\nSandbox: on."


@pytest.mark.parametrize("wrong", [7, {}, [7], [SEARCH] * 129, [{"type": ["x"]}]])
def test_what_is_no_list_of_tools_is_refused(wrong: object) -> None:
    with pytest.raises(Exception, match="tool|list|dictionary"):
        ignoring(tools=wrong)
