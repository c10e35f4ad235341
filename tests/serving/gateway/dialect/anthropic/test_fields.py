"""Every field of anthropic's request types is built, harmless or refused, as docs/wire.md lists it.

A new version of anthropic's package that brings another field fails here.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from serving.errors import InvalidParameter, UnsupportedParameter
from serving.gateway.dialect.anthropic.request import MessagesRequest
from tests.serving.gateway.dialect.anthropic.test_request import request
from tests.support.client_envs import CLIENTS, run_python

PAGE = Path(__file__).parents[5] / "docs" / "wire.md"
HEADING = "## Fields of the Messages API"
ANTHROPIC_FIELDS = CLIENTS / "anthropic_fields.py"
Body = dict[str, Any]

TOOL: Body = {"name": "f", "input_schema": {"type": "object"}}
WITH_TOOL: Body = {"tools": [TOOL]}
FORM: Body = {"type": "json_schema", "schema": {"type": "object"}}
OTHER_FORM = FORM | {"schema": {"type": "array"}}
HELLO: Body = {"role": "user", "content": "hello"}
TEXT: Body = {"type": "text", "text": "x"}
CALL: Body = {"type": "tool_use", "id": "i", "name": "f", "input": {}}
RESULT: Body = {"type": "tool_result", "tool_use_id": "i", "content": "x"}
THOUGHT: Body = {"type": "thinking", "thinking": "hm", "signature": "s"}
CLEARED = {"edits": [{"type": "clear_tool_uses_20250919"}]}


def table() -> dict[str, str]:
    """Returns the rows of the table: field -> the first word of what it says."""
    section = PAGE.read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0]
    rows: dict[str, str] = {}
    for names, meaning in re.findall(r"^\| (`[^|]*`) \| (\w+)", section, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in rows, name
            rows[name] = meaning
    return rows


# Field -> a request without it, and one that asks for something by it.
ASKED: dict[str, tuple[Body, Body]] = {
    "tools": ({}, WITH_TOOL),
    "tool_choice": (WITH_TOOL, WITH_TOOL | {"tool_choice": {"type": "any"}}),
    "tool_choice.type": (
        WITH_TOOL | {"tool_choice": {"type": "any"}},
        WITH_TOOL | {"tool_choice": {"type": "none"}},
    ),
    "tool_choice.name": (WITH_TOOL, WITH_TOOL | {"tool_choice": {"type": "tool", "name": "f"}}),
    "tool_choice.disable_parallel_tool_use": (
        WITH_TOOL | {"tool_choice": {"type": "any"}},
        WITH_TOOL | {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
    ),
    "output_config": ({}, {"output_config": {"format": FORM}}),
    "output_config.format": ({}, {"output_config": {"format": FORM}}),
    "output_config.format.schema": (
        {"output_config": {"format": FORM}},
        {"output_config": {"format": OTHER_FORM}},
    ),
    "context_management.edits": ({}, {"context_management": CLEARED}),
}
for _name, _value in {
    "max_tokens": 5,
    "messages": [HELLO, HELLO],
    "model": "other",
    "system": "be brief",
    "stop_sequences": ["x"],
    "stream": True,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "output_format": FORM,
    "service_tier": "flex",
    "thinking": {"type": "adaptive"},
    "cache_control": {"type": "ephemeral"},
    "metadata": {"user_id": "u"},
    "user_profile_id": "u",
    "workspace_id": "w",
    "speed": "fast",
    "context_management": CLEARED,
    "mcp_servers": [{"type": "url", "url": "http://a", "name": "n"}],
    "fallbacks": "default",
    "container": "c",
    "inference_geo": "us",
    "diagnostics": {"previous_message_id": "msg_1"},
    "compaction": {"type": "auto"},
    "fallback_credit_token": "t",
    "billing_policy": {"type": "p"},
    "thread": {"id": "t"},
}.items():
    ASKED[_name] = ({}, {_name: _value})
for _name, _value in {
    "name": "g",
    "description": "does",
    "input_schema": {"type": "object", "properties": {"a": {}}},
    "strict": True,
    "type": "web_search_20250305",
    "allowed_callers": ["code_execution_20250825"],
    "defer_loading": True,
    "input_examples": [{}],
    "cache_control": {"type": "ephemeral"},
    "eager_input_streaming": True,
}.items():
    ASKED[f"tools.{_name}"] = (WITH_TOOL, {"tools": [TOOL | {_name: _value}]})
for _name, _value in {"effort": "high", "task_budget": {"type": "tokens", "total": 9}}.items():
    ASKED[f"output_config.{_name}"] = ({}, {"output_config": {_name: _value}})
for _name, _value in {"type": "enabled", "budget_tokens": 2000, "display": "omitted"}.items():
    ASKED[f"thinking.{_name}"] = ({}, {"thinking": {"type": "enabled", _name: _value}})


def _blocks(kind: str, role: str, base: Body, **changes: Any) -> None:
    def body(block: Body) -> Body:
        return {"messages": [HELLO, {"role": role, "content": [block]}, HELLO]}

    for name, value in changes.items():
        field = f"messages.content.{kind}.{name}"
        ASKED[field] = (body(base), body(base | {name: value}))


CACHED = {"type": "ephemeral"}
_blocks("text", "user", TEXT, text="y", cache_control=CACHED, citations=[{"type": "c"}])
_blocks("tool_use", "assistant", CALL, id="j", name="g", input={"a": 1}, cache_control=CACHED)
_blocks("tool_use", "assistant", CALL, caller={"type": "direct"}, toolset_name="t")
_blocks("tool_result", "user", RESULT, tool_use_id="j", content="y", is_error=True)
_blocks("tool_result", "user", RESULT, cache_control=CACHED, toolset_name="t")
_blocks("thinking", "assistant", THOUGHT, type="redacted_thinking", thinking="ho", data="x")
_blocks("thinking", "assistant", THOUGHT, signature="t")
for _role, _content in (("assistant", "hello"), ("user", "other")):
    _turn = {"role": _role, "content": _content}
    ASKED["messages.role" if _role == "assistant" else "messages.content"] = (
        {},
        {"messages": [_turn]},
    )

# Each of these names what the rest of its block is, and no more.
KINDS = {
    *("messages.content.text.type", "messages.content.tool_use.type"),
    *("messages.content.tool_result.type", "output_config.format.type"),
}
# Names that other clients use here, or older versions of this one.
OTHERS = {"stop", "n", "stream_options"}
OLDER = {"temperature", "top_p", "top_k", "output_format"}


@pytest.mark.slow
def test_every_field_of_anthropics_types_has_a_row() -> None:
    """anthropic has packages of its own, so its types are read where it lives."""
    known = set(json.loads(run_python("anthropic", ANTHROPIC_FIELDS, {})))
    assert "max_tokens" in known and "messages.content.tool_result.is_error" in known
    rows = table()
    assert known - rows.keys() == set(), "docs/wire.md lacks these fields of anthropic's types"
    assert rows.keys() - known == OTHERS | OLDER


def test_every_row_is_a_field_of_ours() -> None:
    rows = table()
    top = {name for name in rows if "." not in name}
    assert top <= MessagesRequest.model_fields.keys()
    assert set(rows.values()) == {"built", "harmless", "refused"}
    assert rows.keys() - ASKED.keys() == KINDS | OTHERS  # test_request.py tries the others


@pytest.mark.parametrize("field", sorted(ASKED))
def test_a_field_does_what_its_row_says(field: str) -> None:
    without, asking = ASKED[field]
    before = request(**without)
    match table()[field]:
        case "refused":
            with pytest.raises(UnsupportedParameter):
                request(**asking)
        case "harmless":
            assert request(**asking).protos() == before.protos()
        case "built":
            after = request(**asking)
            changed = (after.protos(), after.stream, after.scheduling_priority)
            assert changed != (before.protos(), before.stream, before.scheduling_priority)


@pytest.mark.parametrize(
    "body", [{"stop": ["x"]}, {"n": 2}, {"stream": True, "stream_options": {"include_usage": True}}]
)
def test_names_of_other_apis_are_refused(body: Body) -> None:
    with pytest.raises(InvalidParameter):
        request(**body)


def test_values_that_ask_for_nothing_are_taken() -> None:
    asked = request(
        thinking={"type": "disabled"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        container=None,
        mcp_servers=[],
        stop=None,
    )
    assert asked.protos() == request().protos()
