"""Every field of clients' request types is built, harmless or refused, as docs/wire.md lists it.

A new version of a client that brings another field fails here.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from azure.ai.inference import ChatCompletionsClient
from azure.ai.inference import models as azure
from openai.types import chat as openai_chat
from openai.types import completion_create_params, shared_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.shared_params import response_format_json_schema

from serving.errors import UnsupportedParameter
from serving.gateway.dialect.chat.request import ChatRequest
from serving.gateway.dialect.fields import Parameters
from serving.gateway.dialect.openai import UNSUPPORTED, check_unknown
from serving.gateway.dialect.parsing import read
from serving.gateway.dialect.text.request import CompletionRequest
from tests.support.client_envs import CLIENTS, run_python

PAGE = Path(__file__).parents[4] / "docs" / "wire.md"
HEADING = "## Fields of chats and texts"

# The place of a type in a request, as the table writes it -> the types.
OPENAI: dict[str, list[Any]] = {
    "": [
        chat_create_params.CompletionCreateParamsStreaming,
        completion_create_params.CompletionCreateParamsStreaming,
    ],
    "stream_options.": [openai_chat.ChatCompletionStreamOptionsParam],
    "response_format.": [
        shared_params.ResponseFormatJSONSchema,
        shared_params.ResponseFormatJSONObject,
        shared_params.ResponseFormatText,
    ],
    "response_format.json_schema.": [response_format_json_schema.JSONSchema],
    "tools.": [openai_chat.ChatCompletionFunctionToolParam],
    "tools.function.": [shared_params.FunctionDefinition],
    "messages.": [
        openai_chat.ChatCompletionSystemMessageParam,
        openai_chat.ChatCompletionDeveloperMessageParam,
        openai_chat.ChatCompletionUserMessageParam,
        openai_chat.ChatCompletionAssistantMessageParam,
        openai_chat.ChatCompletionToolMessageParam,
        openai_chat.ChatCompletionFunctionMessageParam,
    ],
    "messages.content.": [
        openai_chat.ChatCompletionContentPartTextParam,
        openai_chat.ChatCompletionContentPartRefusalParam,
    ],
    "messages.tool_calls.": [openai_chat.ChatCompletionMessageFunctionToolCallParam],
    "messages.tool_calls.function.": [
        openai_chat.chat_completion_message_function_tool_call_param.Function
    ],
}
AZURE: dict[str, list[Any]] = {
    "response_format.json_schema.": [azure.JsonSchemaFormat],
    "tools.": [azure.ChatCompletionsToolDefinition],
    "tools.function.": [azure.FunctionDefinition],
    "messages.": [
        azure.SystemMessage,
        azure.DeveloperMessage,
        azure.UserMessage,
        azure.AssistantMessage,
        azure.ToolMessage,
    ],
    "messages.content.": [azure.TextContentItem],
    "messages.tool_calls.": [azure.ChatCompletionsToolCall],
    "messages.tool_calls.function.": [azure.FunctionCall],
}
# Arguments of Azure's function that are no fields of the body.
_NO_FIELDS = {"body", "self", "model_extras", "kwargs"}


def table() -> dict[str, str]:
    """Returns the rows of the table: field -> the first word of what it says."""
    section = PAGE.read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0]
    rows: dict[str, str] = {}
    for names, meaning in re.findall(r"^\| (`[^|]*`) \| (\w+)", section, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in rows, name
            rows[name] = meaning
    return rows


HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object"}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
FUNCTION: dict[str, Any] = {"name": "f", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}

# Field -> a request without it, and one that asks for something by it.
ASKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    name: ({}, {name: value})
    for name, value in {
        "messages": [{"role": "user", "content": "other"}],
        "model": "other",
        "temperature": 0.5,
        "top_p": 0.5,
        "seed": 3,
        "random_seed": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {"5": 1},
        "top_k": 3,
        "min_p": 0.5,
        "repetition_penalty": 1.5,
        "max_tokens": 5,
        "max_completion_tokens": 5,
        "min_tokens": 5,
        "stop": "x",
        "ignore_eos": True,
        "stop_token_ids": [5],
        "allowed_token_ids": [5],
        "include_stop_str_in_output": True,
        "n": 2,
        "logprobs": True,
        "stream": True,
        "response_format": {"type": "json_object"},
        "structured_outputs": {"json": SCHEMA},
        "guided_json": SCHEMA,
        "guided_regex": "a",
        "guided_choice": ["a"],
        "guided_grammar": 'start: "a"',
        "json_schema": SCHEMA,
        "grammar": 'root ::= "a"',
        "guided_whitespace_pattern": " ",
        "structural_tag": "a",
        "tools": [TOOL],
        "functions": [FUNCTION],
        "function_call": {"name": "f"},
        "safe_prompt": True,
        "priority": 1,
        "service_tier": "flex",
        "cache_salt": "x",
        "modalities": ["text", "audio"],
        "audio": {"voice": "a"},
        "moderation": {"model": "m"},
        "web_search_options": {},
        "prompt_mode": "reasoning",
        "guardrails": [{}],
        "store": True,
        "prompt_logprobs": 2,
        "top_prompt_logprobs": 2,
        "user": "somebody",
        "safety_identifier": "somebody",
        "metadata": {"a": "b"},
        "prompt_cache_key": "key",
        "prompt_cache_options": {"mode": "explicit"},
        "prompt_cache_retention": "24h",
        "prediction": {"type": "content", "content": "a"},
        "reasoning_effort": "high",
        "verbosity": "low",
    }.items()
}
ASKED |= {
    "top_logprobs": ({"logprobs": True}, {"logprobs": True, "top_logprobs": 2}),
    "add_generation_prompt": ({}, {"add_generation_prompt": False}),
    "return_token_ids": ({}, {"return_token_ids": True}),
    "continue_final_message": (
        {"messages": [*HELLO, {"role": "assistant", "content": "a"}]},
        {
            "messages": [*HELLO, {"role": "assistant", "content": "a"}],
            "continue_final_message": True,
        },
    ),
    "tool_choice": ({"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "required"}),
    "parallel_tool_calls": (
        {"tools": [TOOL]},
        {"tools": [TOOL], "parallel_tool_calls": False},
    ),
    "stream_options": (
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True}},
    ),
    "response_format.schema": (
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
    ),
    "response_format.type": (
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
    ),
    "response_format.json_schema": (
        {"response_format": {"type": "json_object"}},
        {"response_format": FORM},
    ),
    "structured_outputs.json": ({}, {"structured_outputs": {"json": SCHEMA}}),
    "structured_outputs.regex": ({}, {"structured_outputs": {"regex": "a"}}),
    "structured_outputs.choice": ({}, {"structured_outputs": {"choice": ["a"]}}),
    "structured_outputs.grammar": ({}, {"structured_outputs": {"grammar": 'start: "a"'}}),
    "structured_outputs.json_object": ({}, {"structured_outputs": {"json_object": True}}),
}


def _within(place: str, base: dict[str, Any], wrap: Any, **changes: Any) -> None:
    for name, value in changes.items():
        ASKED[f"{place}{name}"] = (wrap(base), wrap(base | {name: value}))


_within(
    "stream_options.",
    {},
    lambda options: {"stream": True, "stream_options": options},
    include_usage=True,
    include_obfuscation=True,
)
_within(
    "stream_options.",
    {"include_usage": True},
    lambda options: {"stream": True, "stream_options": options},
    continuous_usage_stats=True,
)
_within(
    "prediction.",
    {"type": "content", "content": "a"},
    lambda prediction: {"prediction": prediction},
    content=[{"type": "text", "text": "b"}],
)
_within(
    "structured_outputs.",
    {"regex": "a"},
    lambda options: {"structured_outputs": options},
    disable_fallback=True,
    disable_any_whitespace=True,
    disable_additional_properties=True,
    whitespace_pattern=" ",
    structural_tag="a",
)
_within(
    "response_format.",
    {"type": "json_schema", "schema": SCHEMA},
    lambda form: {"response_format": form},
    strict=True,
)
_within(
    "response_format.json_schema.",
    FORM["json_schema"],  # type: ignore[arg-type]
    lambda inner: {"response_format": {"type": "json_schema", "json_schema": inner}},
    schema={"type": "array"},
    strict=True,
    name="m",
    description="d",
)
_within(
    "tools.",
    TOOL,
    lambda tool: {"tools": [tool]},
    function={"name": "g"},
    strict=True,
    type="custom",
)
_within(
    "tools.function.",
    FUNCTION,
    lambda function: {"tools": [{"type": "function", "function": function}]},
    name="g",
    description="d",
    parameters={},
    strict=True,
)
_within(
    "messages.",
    {"role": "assistant"},
    lambda message: {"messages": [*HELLO, message]},
    role="developer",
    content="other",
    refusal="no",
    tool_calls=[CALL],
    function_call={"name": "f"},
    audio={"id": "a"},
    name="somebody",
    prefix=True,
)
ASKED["messages.role"] = ({}, {"messages": [{"role": "developer", "content": "hello"}]})
_within(
    "messages.",
    {"role": "tool", "content": "a", "tool_call_id": "a"},
    lambda message: {"messages": [*HELLO, message]},
    tool_call_id="b",
)
_within(
    "messages.content.",
    {"type": "text", "text": "a"},
    lambda part: {"messages": [{"role": "user", "content": [part]}]},
    text="b",
    prompt_cache_breakpoint={"mode": "explicit"},
)
_within(
    "messages.content.",
    {"type": "refusal", "refusal": "a"},
    lambda part: {"messages": [*HELLO, {"role": "assistant", "content": [part]}]},
    refusal="b",
)
_within(
    "messages.tool_calls.",
    CALL,
    lambda call: {"messages": [*HELLO, {"role": "assistant", "tool_calls": [call]}]},
    id="b",
    type="custom",
    index=3,
    function={"name": "g"},
)
_within(
    "messages.tool_calls.function.",
    CALL["function"],  # type: ignore[arg-type]
    lambda function: {
        "messages": [*HELLO, {"role": "assistant", "tool_calls": [{"function": function}]}]
    },
    name="g",
    arguments="[]",
)
# Of text completions alone.
TEXTS: dict[str, Any] = {
    "prompt": "other",
    "echo": True,
    "best_of": 2,
    "suffix": "b",
}
# It names what the rest of its part is, and no more.
KINDS = {"messages.content.type", "prediction.type"}


def request(field: str, **body: Any) -> Parameters:
    if field in TEXTS:
        return read(json.dumps({"prompt": "a"} | body).encode(), CompletionRequest, check_unknown)
    return read(json.dumps({"messages": HELLO} | body).encode(), ChatRequest, check_unknown)


def meaning(asked: Parameters) -> tuple[object, ...]:
    """Returns all that the gateway reads of a request."""
    options = (asked.stream, asked.stream_usage, asked.cache_salt, asked.scheduling_priority)
    return (asked.protos(), *options)


@pytest.mark.parametrize("field", sorted(ASKED.keys() | TEXTS))
def test_a_field_does_what_its_row_says(field: str) -> None:
    without, asking = ASKED[field] if field in ASKED else ({}, {field: TEXTS[field]})
    before = meaning(request(field, **without))
    match table()[field]:
        case "refused":
            with pytest.raises(UnsupportedParameter) as caught:
                request(field, **asking)
            (problem,) = caught.value.problems
            assert field.rpartition(".")[2] in problem.path
        case "harmless":
            assert meaning(request(field, **asking)) == before
        case "built":
            assert meaning(request(field, **asking)) != before


def test_the_table_of_other_servers_parameters_is_the_codes() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("\n## Parameters of other servers")[2]
    rows = re.findall(r"^\| (`[^|]*`) \| ([^|]*) \|$", section.partition("\n## ")[0], re.MULTILINE)
    told = {
        name: tuple(map(json.loads, re.findall(r"`([^`]+)`", values)))
        for names, values in rows
        for name in re.findall(r"`([^`]+)`", names)
    }
    assert told == UNSUPPORTED


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_parameters_of_other_servers_are_refused_where_they_ask_for_something(
    name: str, kind: str
) -> None:
    prompt = {"messages": HELLO} if kind == "chat" else {"prompt": "a"}
    asked_type: type[Parameters] = ChatRequest if kind == "chat" else CompletionRequest

    def meant(**body: Any) -> tuple[object, ...]:
        return meaning(read(json.dumps(prompt | body).encode(), asked_type, check_unknown))

    if name in asked_type.model_fields:
        return  # which has a row of its own
    for value in (None, *UNSUPPORTED[name]):
        assert meant(**{name: value}) == meant()
    with pytest.raises(UnsupportedParameter) as caught:
        meant(**{name: 7})
    (problem,) = caught.value.problems
    assert problem.path == ("body", name)
    assert problem.message.startswith(f"{name} is not supported with this value; ")


def test_true_is_not_one_of_them_where_one_is() -> None:
    for body in ({"skip_special_tokens": 1}, {"length_penalty": True}, {"bad_words": False}):
        with pytest.raises(UnsupportedParameter):
            request("messages", **body)


def test_all_that_other_servers_have_is_named_at_once() -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        request("messages", n_predict=5, repeat_penalty=1.1, wine="red")
    assert str(caught.value) == (
        "n_predict is not supported with this value; the name here is max_tokens; "
        "repeat_penalty is not supported with this value; the name here is repetition_penalty"
    )


def test_every_row_is_tried() -> None:
    rows = table()
    assert rows.keys() - ASKED.keys() - TEXTS.keys() == KINDS
    assert set(rows.values()) == {"built", "harmless", "refused"}
    top = {name for name in rows if "." not in name}
    assert top == ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()


def test_every_field_of_openais_types_has_a_row() -> None:
    known = {
        place + name
        for place, kinds in OPENAI.items()
        for kind in kinds
        for name in get_type_hints(kind)
    }
    assert known - table().keys() == set()


def test_every_field_of_azures_types_has_a_row() -> None:
    # The types are models whose fields are in their annotations, with those of their bases.
    known = {
        place + name
        for place, kinds in AZURE.items()
        for kind in kinds
        for base in kind.__mro__
        for name in getattr(base, "__annotations__", {})
        if not name.startswith("_")
    }
    known |= inspect.signature(ChatCompletionsClient.complete).parameters.keys() - _NO_FIELDS
    assert known - table().keys() == set()


MISTRAL_FIELDS = CLIENTS / "mistral_fields.py"


@pytest.mark.slow
def test_every_field_of_mistrals_types_has_a_row() -> None:
    """mistralai cannot live beside the other clients, so its types are read where it does."""
    known = set(json.loads(run_python("mistral-v3", MISTRAL_FIELDS, {})))
    assert "random_seed" in known and "messages.tool_calls.index" in known
    assert known - table().keys() == set()
