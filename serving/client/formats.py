"""Forms that an answer is held to, as `response_format` of the client: plain data and proto."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serving.proto import inference_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class JsonSchema:
    """A JSON Schema, draft 2020-12, that the answer is valid under.

    Attributes:
        schema: The schema.
        strict: Refuses a schema of which a part cannot be enforced; otherwise that part is listed
            in `weakened` of the answer.
    """

    schema: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class Regex:
    """A regular expression, without look-around, that the whole answer matches."""

    pattern: str


@dataclass(frozen=True)
class OneOf:
    """Texts of which the answer is one."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Lark:
    """A grammar in Lark's notation, as llguidance reads it."""

    grammar: str


@dataclass(frozen=True)
class Gbnf:
    """A grammar in llama.cpp's notation."""

    grammar: str


ResponseFormat = (
    Literal["json_object"] | Mapping[str, Any] | type | JsonSchema | Regex | OneOf | Lark | Gbnf
)
"""Also a JSON Schema as a mapping, and a class with `model_json_schema`, such as pydantic's."""


def message_of(response_format: ResponseFormat) -> pb.ResponseFormat:
    """Returns the message for the wire; raises TypeError or ValueError for what is no form."""
    match response_format:
        case "json_object":
            return pb.ResponseFormat(json_object=pb.JsonObject())
        case JsonSchema(schema=schema, strict=strict):
            return pb.ResponseFormat(json_schema=text_of(schema), strict=strict)
        case Regex(pattern=pattern):
            return pb.ResponseFormat(regex=pattern)
        case OneOf(texts=texts):
            if isinstance(texts, str):
                raise TypeError(f"OneOf takes a list of texts, not {texts!r:.60}")
            return pb.ResponseFormat(choice=pb.Texts(texts=texts))
        case Lark(grammar=grammar):
            return pb.ResponseFormat(lark=grammar)
        case Gbnf(grammar=grammar):
            return pb.ResponseFormat(gbnf=grammar)
        case Mapping():
            return pb.ResponseFormat(json_schema=text_of(response_format))
    schema_of = getattr(response_format, "model_json_schema", None)
    if not isinstance(response_format, type) or schema_of is None:
        raise TypeError(
            f"response_format cannot be {response_format!r:.60}; give 'json_object', a JSON Schema "
            "as a dictionary, a class of pydantic, or JsonSchema, Regex, OneOf, Lark or Gbnf"
        )
    return pb.ResponseFormat(json_schema=text_of(schema_of()))


def text_of(schema: Mapping[str, Any]) -> str:
    """Returns a schema as JSON; raises TypeError or ValueError if it has no such form."""
    return json.dumps(schema, ensure_ascii=False, allow_nan=False)
