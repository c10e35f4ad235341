"""Every field of openai's request types is built, harmless or refused, as docs/wire.md lists it.

A new version of openai's package that brings another field fails here.
"""

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from openai.types.responses import (
    easy_input_message_param,
    function_tool_param,
    response_create_params,
    response_format_text_json_schema_config_param,
    response_function_tool_call_param,
    response_includable,
    response_input_param,
    response_input_text_param,
    response_text_config_param,
)
from openai.types.shared_params import reasoning

from serving.errors import UnsupportedParameter
from serving.gateway.dialect.responses.request import Included, ResponsesRequest
from tests.serving.gateway.dialect.responses.test_request import request

PAGE = Path(__file__).parents[5] / "docs" / "wire.md"
HEADING = "## Fields of the Responses API"

# The place of a type in a request, as the table writes it -> the type.
TYPES: dict[str, Any] = {
    "": response_create_params.ResponseCreateParamsStreaming,
    "text.": response_text_config_param.ResponseTextConfigParam,
    "text.format.": (
        response_format_text_json_schema_config_param.ResponseFormatTextJSONSchemaConfigParam
    ),
    "tools.": function_tool_param.FunctionToolParam,
    "reasoning.": reasoning.Reasoning,
    "stream_options.": response_create_params.StreamOptions,
    "input.message.": easy_input_message_param.EasyInputMessageParam,
    "input.message.content.": response_input_text_param.ResponseInputTextParam,
    "input.function_call.": response_function_tool_call_param.ResponseFunctionToolCallParam,
    "input.function_call_output.": response_input_param.FunctionCallOutput,
}
FORM = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "x"}
LOGPROBS = {"include": ["message.output_text.logprobs"]}


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
ASKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "input": ({}, {"input": "other"}),
    "instructions": ({}, {"instructions": "be brief"}),
    "max_output_tokens": ({}, {"max_output_tokens": 5}),
    "metadata": ({}, {"metadata": {"a": "b"}}),
    "model": ({}, {"model": "other"}),
    "stream": ({}, {"stream": True}),
    "temperature": ({}, {"temperature": 0.5}),
    "top_p": ({}, {"top_p": 0.5}),
    "text": ({}, {"text": {"format": {"type": "json_object"}}}),
    "tools": ({}, {"tools": [TOOL]}),
    "tool_choice": ({"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "required"}),
    "parallel_tool_calls": (
        {"tools": [TOOL]},
        {"tools": [TOOL], "parallel_tool_calls": False},
    ),
    "include": ({}, LOGPROBS),
    "top_logprobs": (LOGPROBS, LOGPROBS | {"top_logprobs": 2}),
    "service_tier": ({}, {"service_tier": "flex"}),
    "user": ({}, {"user": "somebody"}),
    "safety_identifier": ({}, {"safety_identifier": "somebody"}),
    "prompt_cache_key": ({}, {"prompt_cache_key": "key"}),
    "prompt_cache_options": ({}, {"prompt_cache_options": {"mode": "explicit"}}),
    "prompt_cache_retention": ({}, {"prompt_cache_retention": "24h"}),
    "max_tool_calls": ({}, {"max_tool_calls": 2}),
    "reasoning": ({}, {"reasoning": {"effort": "high"}}),
    "stream_options": ({}, {"stream_options": {}}),
    "background": ({}, {"background": True}),
    "context_management": ({}, {"context_management": [{"type": "compaction"}]}),
    "conversation": ({}, {"conversation": "conv_1"}),
    "access_programs": ({}, {"access_programs": {"cyber": "standard"}}),
    "background_options": ({}, {"background_options": {"completion_window": "2h"}}),
    "image": ({}, {"image": {"context_compression": "auto"}}),
    "moderation": ({}, {"moderation": {"model": "m"}}),
    "previous_response_id": ({}, {"previous_response_id": "resp_1"}),
    "prompt": ({}, {"prompt": {"id": "pmpt_1"}}),
    "store": ({}, {"store": True}),
    "truncation": ({}, {"truncation": "auto"}),
    "text.format": ({}, {"text": {"format": FORM}}),
    "text.verbosity": ({}, {"text": {"verbosity": "high"}}),
    "text.format.type": ({}, {"text": {"format": {"type": "json_object"}}}),
    "text.format.schema": (
        {"text": {"format": FORM}},
        {"text": {"format": FORM | {"schema": {"type": "array"}}}},
    ),
    "text.format.strict": (
        {"text": {"format": FORM}},
        {"text": {"format": FORM | {"strict": True}}},
    ),
    "text.format.name": ({"text": {"format": FORM}}, {"text": {"format": FORM | {"name": "m"}}}),
    "text.format.description": (
        {"text": {"format": FORM}},
        {"text": {"format": FORM | {"description": "d"}}},
    ),
    "tools.type": ({"tools": [TOOL]}, {"tools": [TOOL, {"type": "mcp"}]}),
    "tools.name": ({"tools": [TOOL]}, {"tools": [TOOL | {"name": "g"}]}),
    "tools.description": ({"tools": [TOOL]}, {"tools": [TOOL | {"description": "d"}]}),
    "tools.parameters": ({"tools": [TOOL]}, {"tools": [TOOL | {"parameters": None}]}),
    "tools.strict": ({"tools": [TOOL]}, {"tools": [TOOL | {"strict": True}]}),
    "tools.allowed_callers": (
        {"tools": [TOOL]},
        {"tools": [TOOL | {"allowed_callers": ["programmatic"]}]},
    ),
    "tools.defer_loading": ({"tools": [TOOL]}, {"tools": [TOOL | {"defer_loading": True}]}),
    "tools.async": ({"tools": [TOOL]}, {"tools": [TOOL | {"async": True}]}),
    "tools.output_schema": ({"tools": [TOOL]}, {"tools": [TOOL | {"output_schema": {}}]}),
    "stream_options.include_obfuscation": (
        {},
        {"stream_options": {"include_obfuscation": True}},
    ),
}
ASKED |= {
    f"reasoning.{name}": ({}, {"reasoning": {name: "auto"}})
    for name in get_type_hints(reasoning.Reasoning)
}


def _items(place: str, base: dict[str, Any], **changes: Any) -> None:
    for name, value in changes.items():
        ASKED[f"input.{place}.{name}"] = ({"input": [base]}, {"input": [base | {name: value}]})


MESSAGE = {"role": "user", "content": "hello"}
_items("message", MESSAGE, type="message", role="system", content="other", phase="final_answer")
_items("function_call", CALL, call_id="d", name="g", arguments="[]", id="fc_1", status="completed")
_items("function_call", CALL, caller={"type": "direct"}, namespace="n", **{"async": True})
_items("function_call_output", RESULT, call_id="d", output="y", id="i", status="completed")
_items("function_call_output", RESULT, caller={"type": "direct"}, name="f", namespace="n")
_PART = {"type": "input_text", "text": "hello"}
for _name, _value in {
    "type": "output_text",
    "text": "other",
    "prompt_cache_breakpoint": {"mode": "explicit"},
}.items():
    ASKED[f"input.message.content.{_name}"] = (
        {"input": [MESSAGE | {"content": [_PART]}]},
        {"input": [MESSAGE | {"content": [_PART | {_name: _value}]}]},
    )
# Each of these names what the rest of its item is, and no more.
KINDS = {"input.function_call.type", "input.function_call_output.type"}

# Names that other clients use here, which openai's types do not have.
OTHERS = {"client_metadata", "n", "max_tokens"}
# Fields of version 3 of openai's package, which need not be the one that is installed.
NEWER = {
    *("access_programs", "background_options", "image", "tools.async"),
    "input.function_call.async",
}


def test_every_field_of_openais_types_has_a_row() -> None:
    known = {place + name for place, kind in TYPES.items() for name in get_type_hints(kind)}
    rows = table()
    assert known - rows.keys() == set(), "docs/wire.md lacks these fields of openai's types"
    assert rows.keys() - known <= OTHERS | NEWER
    top = {name for name in rows if "." not in name}
    assert top <= ResponsesRequest.model_fields.keys()
    assert set(rows.values()) == {"built", "harmless", "refused"}


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
            changed = (after.protos(), after.repeated(), after.stream, after.scheduling_priority)
            assert changed != (
                *(before.protos(), before.repeated(), before.stream),
                before.scheduling_priority,
            )


def test_every_row_is_tried() -> None:
    assert table().keys() - ASKED.keys() == KINDS | OTHERS  # test_request.py tries the others


def test_every_addition_that_can_be_asked_for_is_known() -> None:
    assert get_args(Included) == get_args(response_includable.ResponseIncludable)
