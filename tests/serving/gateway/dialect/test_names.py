"""Names of parameters in refusals: those that the client has used."""

import json
from typing import Any

import pytest

from serving.errors import ContextTooLong, InvalidParameter, InvalidRequest, Problem
from serving.gateway.dialect.chat.request import ChatRequest
from serving.gateway.dialect.openai import check_unknown
from serving.gateway.dialect.parsing import read
from serving.gateway.dialect.responses.request import ResponsesRequest
from serving.gateway.dialect.text.request import CompletionRequest
from serving.gateway.dialect.tokens.request import DetokenizeRequest
from tests.support.chats import HELLO


def chat(**parameters: Any) -> ChatRequest:
    body = json.dumps({"messages": HELLO} | parameters).encode()
    return read(body, ChatRequest, check_unknown)


def refusal(*path: str) -> InvalidParameter:
    """Returns a refusal as the service's crosses gRPC."""
    text = f"{'.'.join(path)}: not is not supported (at /properties/a)"
    problem = Problem(InvalidParameter.azure_code, ("body", *path), text, None)
    return InvalidParameter(text, [problem])


@pytest.mark.parametrize(
    ("parameters", "own", "sent"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema",
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_object", "schema": {}}},
            "response_format.json_schema",
            "response_format.schema",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format"),
        ({"guided_json": {}}, "response_format.json_schema", "guided_json"),
        ({"grammar": "root ::= a"}, "response_format.gbnf", "grammar"),
        (
            {"structured_outputs": {"json": {}}},
            "response_format.json_schema",
            "structured_outputs.json",
        ),
        (
            {"structured_outputs": {"regex": "("}},
            "response_format.regex",
            "structured_outputs.regex",
        ),
        ({}, "chat.tools.3.parameters", "tools.3.function.parameters"),
        ({}, "chat.tool_choice", "tool_choice"),
        ({}, "n", "n"),
    ],
)
def test_a_refusal_names_what_the_client_sent(
    parameters: dict[str, Any], own: str, sent: str
) -> None:
    told = chat(**parameters).as_sent(refusal(*own.split(".")))
    assert str(told) == f"{sent}: not is not supported (at /properties/a)"
    assert isinstance(told, InvalidParameter)
    (problem,) = told.problems
    assert ".".join(problem.path) == f"body.{sent}"
    assert problem.message == str(told)


def test_a_prompt_that_is_too_long_is_named() -> None:
    text = read(b'{"prompt": "a"}', CompletionRequest, check_unknown)
    response = read(b'{"input": "a"}', ResponsesRequest, check_unknown)
    for asked, name in ((chat(), "messages"), (text, "prompt"), (response, "input")):
        told = asked.as_sent(ContextTooLong("too long"))
        assert isinstance(told, ContextTooLong)
        assert told.parameter == name


def test_a_schema_of_the_responses_api_is_named() -> None:
    body = b'{"input": "a", "text": {"format": {"type": "json_schema", "schema": {}}}}'
    asked = read(body, ResponsesRequest, check_unknown)
    told = asked.as_sent(refusal("response_format", "json_schema"))
    assert str(told).startswith("text.format.schema: not is not supported")


def test_other_refusals_stay() -> None:
    for error in (InvalidRequest("what"), InvalidParameter("n is 17")):
        assert chat().as_sent(error) is error


@pytest.mark.parametrize("field", ["text", "token_ids"])
def test_a_refused_prompt_has_the_name_that_the_client_sent(field: str) -> None:
    text = f"{field} is empty; give at least one"
    error = InvalidParameter(text, [Problem("Invalid input", ("body", field), text, None)])
    sent = CompletionRequest.model_validate({"prompt": ""}).as_sent(error)
    assert str(sent) == "prompt is empty; give at least one"


def test_refused_ids_have_the_name_of_detokenize() -> None:
    text = "ids holds 300; ids are below 261"
    error = InvalidParameter(text, [Problem("Invalid input", ("body", "ids"), text, None)])
    sent = DetokenizeRequest(tokens=[300]).as_sent(error)
    assert str(sent) == "tokens holds 300; ids are below 261"
    assert sent.problems[0].path == ("body", "tokens")
