"""Parameters of the Responses API, and what they mean in the proto."""

import json
from typing import Any

import pytest

from serving.errors import InvalidParameter, InvalidRequest, ServingError, UnsupportedParameter
from serving.gateway.dialect.parsing import read
from serving.gateway.dialect.responses.hosted_tools import ResponsesFields
from serving.gateway.dialect.responses.request import ResponsesRequest
from serving.proto import inference_pb2

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {"const": "é"}}}


def request(**body: Any) -> ResponsesRequest:
    """Returns the request of a body, without hosted tools."""
    fields = ResponsesFields(ignores_hosted_tools=False)
    given = {"input": "hello"} | body
    return read(json.dumps(given).encode(), ResponsesRequest, fields.apply)


def asked(**body: Any) -> list[inference_pb2.GenerateRequest]:
    """Returns the calls of the service for a body."""
    return request(**body).protos()


def test_parameters() -> None:
    (call,) = asked(max_output_tokens=5, temperature=0.5, top_p=0.25, seed=7, stop=["x"])
    assert (call.max_tokens, list(call.stop), call.sampling.seed) == (5, ["x"], 7)
    assert (call.sampling.temperature, call.sampling.top_p) == (0.5, 0.25)
    assert not call.HasField("response_format") and not call.HasField("top_logprobs")
    (call,) = asked()
    assert not call.HasField("max_tokens") and not call.sampling.HasField("temperature")


def test_forms_of_the_answer() -> None:
    form = {"type": "json_schema", "name": "x", "strict": True, "schema": SCHEMA}
    (call,) = asked(text={"format": form, "verbosity": "low"})
    # The order of properties is the client's.
    text = '{"type":"object","properties":{"b":{},"a":{"const":"é"}}}'
    assert call.response_format == inference_pb2.ResponseFormat(json_schema=text, strict=True)
    (call,) = asked(text={"format": {"type": "json_object"}})
    assert call.response_format.WhichOneof("kind") == "json_object"
    for harmless in (None, {}, {"format": None}, {"format": {"type": "text"}}):
        (call,) = asked(text=harmless)
        assert not call.HasField("response_format")


def test_logprobs_are_asked_for_with_include() -> None:
    included = ["message.output_text.logprobs", "reasoning.encrypted_content"]
    (call,) = asked(include=included, top_logprobs=3)
    assert call.top_logprobs == 3
    (call,) = asked(include=included)
    assert call.HasField("top_logprobs") and call.top_logprobs == 0
    with pytest.raises(InvalidRequest, match="more than 16,777,216 bytes"):
        asked(include=included, top_logprobs=20, max_output_tokens=10_000, stream=True)


def test_what_is_repeated() -> None:
    tool = {"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}
    shown = request(
        instructions="be brief",
        max_output_tokens=5,
        metadata={"a": "b"},
        parallel_tool_calls=False,
        service_tier="batch",
        temperature=0.5,
        text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        tools=[tool, {"type": "function", "name": "g"}],
        tool_choice={"type": "function", "name": "f"},
        user="somebody",
        reasoning={"effort": "high"},
    ).repeated()
    assert shown == {
        "instructions": "be brief",
        "max_output_tokens": 5,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "flex",
        "temperature": 0.5,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        "tool_choice": {"type": "function", "name": "f"},
        "tools": [
            tool | {"description": None},
            {
                "type": "function",
                "name": "g",
                "description": None,
                "parameters": None,
                "strict": None,
            },
        ],
        "top_logprobs": 0,
        "top_p": None,
        "user": "somebody",
    }


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        (("response_format", "json_schema"), ("text", "format", "schema")),
        (("response_format",), ("text", "format")),
        (("max_tokens",), ("max_output_tokens",)),
        (("messages", "3", "content"), ("input",)),
        (("tools", "0", "parameters"), ("tools", "0", "parameters")),
        (("temperature",), ("temperature",)),
    ],
)
def test_a_refusal_of_the_service_names_the_clients_field(
    path: tuple[str, ...], sent: tuple[str, ...]
) -> None:
    assert request().sent_path(path) == sent


@pytest.mark.parametrize(
    "harmless",
    [
        {"store": False, "background": False, "truncation": "disabled"},
        {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low"}},
        {"safety_identifier": "x", "prompt_cache_key": "y", "prompt_cache_retention": "24h"},
        {"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}, "max_tool_calls": 3},
        {"stream_options": {"include_obfuscation": False}, "context_management": []},
        {"previous_response_id": None, "conversation": None, "prompt": None, "moderation": None},
        {"service_tier": "fast", "metadata": {}, "client_metadata": {"x-codex": "1"}},
    ],
)
def test_what_is_harmless_is_taken(harmless: dict[str, Any]) -> None:
    assert asked(**harmless) == asked()


@pytest.mark.parametrize(
    ("refused", "kind", "text"),
    [
        ({"store": True}, UnsupportedParameter, "store"),
        ({"previous_response_id": "resp_1"}, UnsupportedParameter, "previous_response_id"),
        ({"conversation": {"id": "conv_1"}}, UnsupportedParameter, "conversation"),
        ({"background": True}, UnsupportedParameter, "background"),
        ({"prompt": {"id": "pmpt_1"}}, UnsupportedParameter, "prompt"),
        ({"truncation": "auto"}, UnsupportedParameter, "truncation"),
        ({"moderation": {"model": "x"}}, UnsupportedParameter, "moderation"),
        ({"context_management": [{}]}, UnsupportedParameter, "context_management"),
        ({"stream_options": {"include_obfuscation": True}}, UnsupportedParameter, "obfuscation"),
        ({"n": 2}, UnsupportedParameter, "n is not supported"),
        ({"max_tokens": 5}, InvalidParameter, "give max_output_tokens"),
        ({"top_logprobs": 2}, InvalidParameter, "top_logprobs needs 'message.output_text"),
        ({"include": ["everything"]}, InvalidParameter, "message.output_text.logprobs"),
        ({"metadata": {str(n): "" for n in range(17)}}, InvalidParameter, "at most 16"),
        ({"text": {"format": {"type": "json_schema"}}}, InvalidParameter, "has a 'schema'"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, InvalidParameter, "no other"),
        ({"text": {"format": {"type": "grammar"}}}, InvalidParameter, "'json_schema'"),
        ({"max_output_tokens": -1}, InvalidParameter, "greater than or equal to 0"),
        ({"wine": "red"}, InvalidParameter, "Extra inputs are not permitted"),
        ({"messages": []}, InvalidParameter, "Extra inputs are not permitted"),
    ],
)
def test_what_is_refused(refused: dict[str, Any], kind: type[ServingError], text: str) -> None:
    with pytest.raises(kind, match=text) as raised:
        asked(**refused)
    assert type(raised.value) is kind
