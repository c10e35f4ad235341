"""Forms of answers: what each vendor's names become in the proto, and what is refused."""

import json
from typing import Any

import pytest

from serving.errors import InvalidParameter, UnsupportedParameter
from serving.gateway.dialect.forms import MAX_CHOICES, MAX_GRAMMAR, MAX_SCHEMA
from serving.gateway.dialect.openai import check_unknown
from serving.gateway.dialect.parsing import read
from serving.gateway.dialect.text.request import CompletionRequest
from serving.proto import inference_pb2 as pb
from tests.support.chats import PASS, asked

# Not in the order of the alphabet, which must survive.
SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"enum": ["é", 1.5]}}}
TEXT = '{"type":"object","properties":{"b":{"type":"string"},"a":{"enum":["é",1.5]}}}'
JSON_OBJECT = pb.ResponseFormat(json_object=pb.JsonObject())
LAX, STRICT = pb.ResponseFormat(json_schema=TEXT), pb.ResponseFormat(json_schema=TEXT, strict=True)


def form(**parameters: Any) -> pb.ResponseFormat | None:
    """Returns the form that a chat's answer is held to, which is that of a text's."""
    call = asked(PASS, **parameters)
    body = json.dumps({"prompt": "a"} | parameters).encode()
    (text,) = read(body, CompletionRequest, check_unknown).protos()
    assert call.response_format == text.response_format
    return call.response_format if call.HasField("response_format") else None


@pytest.mark.parametrize(
    ("asked_format", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": {"type": "text"}}, None),
        ({"type": "json_object"}, JSON_OBJECT),
        ({"type": {"type": "json_object"}}, JSON_OBJECT),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}, LAX),
        (
            {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": None}},
            LAX,
        ),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "n", "description": "d", "schema": SCHEMA, "strict": True},
            },
            STRICT,
        ),
        # llama.cpp's.
        ({"type": "json_schema", "schema": SCHEMA}, LAX),
        ({"type": "json_schema", "schema": SCHEMA, "strict": True, "name": "n"}, STRICT),
        ({"type": "json_object", "schema": SCHEMA}, LAX),
    ],
)
def test_response_format(asked_format: object, expected: pb.ResponseFormat | None) -> None:
    assert form(response_format=asked_format) == expected


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"structured_outputs": {"json": SCHEMA}}, LAX),
        ({"structured_outputs": {"json": TEXT, "regex": None}}, LAX),
        ({"structured_outputs": {"regex": "a+"}}, pb.ResponseFormat(regex="a+")),
        (
            {"structured_outputs": {"choice": ["a", "b"]}},
            pb.ResponseFormat(choice=pb.Texts(texts=["a", "b"])),
        ),
        (
            {"structured_outputs": {"grammar": 'start: "a"'}},
            pb.ResponseFormat(lark='start: "a"'),
        ),
        (
            {"structured_outputs": {"grammar": '# root\nroot ::= "a"'}},
            pb.ResponseFormat(gbnf='# root\nroot ::= "a"'),
        ),
        ({"structured_outputs": {"json_object": True, "disable_fallback": True}}, JSON_OBJECT),
        ({"guided_json": SCHEMA}, LAX),
        ({"guided_json": TEXT}, LAX),
        ({"guided_regex": "a+"}, pb.ResponseFormat(regex="a+")),
        ({"guided_choice": ["a"]}, pb.ResponseFormat(choice=pb.Texts(texts=["a"]))),
        ({"guided_grammar": 'start: "::="'}, pb.ResponseFormat(lark='start: "::="')),
        ({"guided_grammar": 'root ::= "a"'}, pb.ResponseFormat(gbnf='root ::= "a"')),
        ({"json_schema": SCHEMA}, LAX),
        ({"grammar": 'root ::= "a"'}, pb.ResponseFormat(gbnf='root ::= "a"')),
        ({"guided_json": SCHEMA, "response_format": {"type": "text"}}, LAX),
    ],
)
def test_the_names_of_vllm_and_llama_cpp(
    parameters: dict[str, Any], expected: pb.ResponseFormat
) -> None:
    assert form(**parameters) == expected


@pytest.mark.parametrize(
    ("parameters", "path"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": "{}"}}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "schema": {},
                    "json_schema": {"schema": {}},
                }
            },
            "response_format",
        ),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
            "response_format",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regx": "a", "regex": "b"}}, "structured_outputs.regx"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guided_choice": [""]}, "guided_choice.0"),
        ({"guided_choice": ["a"] * (MAX_CHOICES + 1)}, "guided_choice"),
        ({"guided_regex": "a" * (MAX_GRAMMAR + 1)}, "guided_regex"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_json": {"const": "a" * MAX_SCHEMA}}, "guided_json"),
        ({"guided_json": 5}, "guided_json"),
        ({"json_schema": "{}"}, "json_schema"),
        ({"grammar": 5}, "grammar"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "json_schema": {}}, "json_schema"),
        ({"structured_outputs": {"regex": "a"}, "grammar": "b"}, "grammar"),
    ],
)
def test_mistakes_are_named(parameters: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        form(**parameters)
    assert type(caught.value) is InvalidParameter
    assert [".".join(problem.path) for problem in caught.value.problems] == [f"body.{path}"]


def test_two_forms_are_both_named() -> None:
    with pytest.raises(InvalidParameter, match="guided_json and guided_regex both"):
        form(guided_json={}, guided_regex="a")


def test_a_number_that_json_cannot_hold_is_refused() -> None:
    body = b'{"prompt": "a", "guided_json": {"maximum": 1e999}}'
    with pytest.raises(InvalidParameter, match="out of range"):
        read(body, CompletionRequest, check_unknown)


@pytest.mark.parametrize(
    ("parameters", "path"),
    [
        ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format.type"),
        ({"response_format": {"type": "grammar", "grammar": "a"}}, "response_format.type"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
        (
            {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
        ),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"structural_tag": "a"}, "structural_tag"),
    ],
)
def test_what_vllm_has_and_we_have_not_is_named(parameters: dict[str, Any], path: str) -> None:
    with pytest.raises(UnsupportedParameter, match=path.rpartition(".")[2]) as caught:
        form(**parameters)
    assert [".".join(problem.path) for problem in caught.value.problems] == [f"body.{path}"]


@pytest.mark.parametrize("schema", [True, [], 5])
def test_a_schema_that_is_no_object_is_called_so(schema: object) -> None:
    with pytest.raises(InvalidParameter, match="a schema is a JSON object"):
        form(response_format={"type": "json_schema", "json_schema": {"schema": schema}})
