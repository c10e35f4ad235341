"""Forms that an answer is held to, under the names that OpenAI, vLLM and llama.cpp have for them.

A request has at most one of them. Schemas go into the proto as JSON with their properties in the
order in which the client wrote them, because that is the order in which the model writes them.

https://platform.openai.com/docs/guides/structured-outputs
https://docs.vllm.ai/en/latest/features/structured_outputs.html
https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
"""

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.fields import (
    NOT_SUPPORTED,
    Described,
    Name,
    Never,
    Parameters,
    Text,
    at_most,
    only,
)
from serving.gateway.dialect.names import Path
from serving.proto import inference_pb2

# Characters of a schema as JSON. The service has a bound of its own.
MAX_SCHEMA = 2**18
# Characters of a regular expression or a grammar.
MAX_GRAMMAR = 2**16
# Texts that an answer may be one of, and characters of one of them.
MAX_CHOICES = 4096
MAX_CHOICE_LENGTH = 4096
# Members of vLLM's object.
MAX_OPTIONS = 16

_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)


def written(value: object) -> object:
    """Returns a JSON Schema as JSON, if it is an object; a text as it is."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "a schema is a JSON object")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise PydanticCustomError(
            "schema_number", "the schema has a number that is out of range"
        ) from None


def _only_object(value: object) -> object:
    if isinstance(value, str):
        raise PydanticCustomError("dict_type", "a schema is a JSON object")
    return written(value)


Schema = Annotated[
    str,
    Field(max_length=MAX_SCHEMA),
    BeforeValidator(_only_object, json_schema_input_type=dict[str, Any]),
]
# vLLM takes a schema as JSON too.
SchemaOrText = Annotated[
    str,
    Field(max_length=MAX_SCHEMA),
    BeforeValidator(written, json_schema_input_type=dict[str, Any] | str),
]
Grammar = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR)]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_LENGTH)]],
    Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
]


class JsonSchema(Described):
    """OpenAI's name for a schema with a name."""

    name: Name | None = None
    """Means nothing here."""
    description: Text | None = None
    """Means nothing here."""
    schema_text: Schema = Field(alias="schema")
    """A JSON Schema, draft 2020-12."""
    strict: bool | None = None
    """Refuses the schema if a part of it cannot be enforced. All else is enforced either way."""


def _format_type(kind: object) -> object:
    if kind in ("structural_tag", "grammar", "python"):
        raise PydanticCustomError(
            NOT_SUPPORTED, "response_format of type '{kind}' is not supported", {"kind": kind}
        )
    return kind


FormatType = Literal["text", "json_object", "json_schema"]


class ResponseFormat(Described):
    """The form of an answer, as OpenAI's clients ask for it, and llama.cpp's."""

    type: Annotated[FormatType, BeforeValidator(_format_type, json_schema_input_type=FormatType)]
    """`text`, `json_object` for any JSON object, or `json_schema`."""
    json_schema: JsonSchema | None = None
    """With `json_schema`: the schema."""
    schema_text: Schema | None = Field(default=None, alias="schema")
    """llama.cpp's place for the schema, also with `json_object`."""
    strict: bool | None = None
    """With `schema`: as in `json_schema`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("json_schema", "schema_text") if getattr(self, name) is not None]
        problem = ""
        if len(given) == 2:
            problem = "json_schema and schema are the same; give one of them"
        elif self.type == "json_schema" and not given:
            problem = "the type json_schema needs a json_schema with a schema"
        elif self.type == "text" and given or self.type == "json_object" and self.json_schema:
            problem = "with a schema the type is json_schema"
        if problem:
            raise PydanticCustomError("response_format", problem)
        return self

    def proto(self) -> inference_pb2.ResponseFormat | None:
        """Returns the form; None for any text."""
        if self.json_schema is not None:
            return inference_pb2.ResponseFormat(
                json_schema=self.json_schema.schema_text, strict=bool(self.json_schema.strict)
            )
        if self.schema_text is not None:
            return inference_pb2.ResponseFormat(
                json_schema=self.schema_text, strict=bool(self.strict)
            )
        if self.type == "json_object":
            return inference_pb2.ResponseFormat(json_object=inference_pb2.JsonObject())
        return None


def _without_nesting(value: object) -> object:
    """Returns a format whose type is a text: early clients write {"type": {"type": "text"}}."""
    while isinstance(value, dict) and isinstance(value.get("type"), dict):
        value = value["type"]
    return {"type": value} if isinstance(value, str) else value


class StructuredOutputs(Described):
    """The form of an answer, as vLLM's clients ask for it: exactly one of the first five."""

    model_config = ConfigDict(extra="forbid")

    schema_text: SchemaOrText | None = Field(default=None, alias="json")
    """A JSON Schema, or one as JSON."""
    regex: Grammar | None = None
    """A regular expression that the whole answer matches."""
    choice: Choices | None = None
    """Texts of which the answer is one."""
    grammar: Grammar | None = None
    """A grammar, in Lark's notation or with `::=` in llama.cpp's."""
    json_object: bool | None = None
    """Whether the answer is any JSON object."""
    disable_fallback: bool | None = None
    """Means nothing here: there is one backend."""
    disable_any_whitespace: Annotated[bool | None, only(False)] = None
    """Whether JSON is without white space; not supported."""
    disable_additional_properties: Annotated[bool | None, only(False)] = None
    """Whether objects that allow other properties are closed; not supported."""
    whitespace_pattern: Never = None
    """A regular expression of the white space within JSON; not supported."""
    structural_tag: Never = None
    """Pieces of an answer with forms of their own; not supported."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = ("schema_text", "regex", "choice", "grammar")
        number = sum(getattr(self, name) is not None for name in names) + bool(self.json_object)
        if number != 1:
            raise PydanticCustomError(
                "structured_outputs",
                "structured_outputs has {number} of json, regex, choice, grammar and json_object; "
                "give exactly one",
                {"number": number},
            )
        return self

    def proto(self) -> inference_pb2.ResponseFormat:
        """Returns the form."""
        if self.schema_text is not None:
            return inference_pb2.ResponseFormat(json_schema=self.schema_text)
        if self.regex is not None:
            return inference_pb2.ResponseFormat(regex=self.regex)
        if self.choice is not None:
            return one_of(self.choice)
        if self.grammar is not None:
            return grammar_form(self.grammar)
        return inference_pb2.ResponseFormat(json_object=inference_pb2.JsonObject())


def one_of(texts: list[str]) -> inference_pb2.ResponseFormat:
    """Returns the form of an answer that is one of the texts."""
    return inference_pb2.ResponseFormat(choice=inference_pb2.Texts(texts=texts))


def grammar_form(grammar: str) -> inference_pb2.ResponseFormat:
    """Returns the form of an answer that matches a grammar, in whichever notation it is.

    vLLM tells the notations apart in the same way: llama.cpp's rules have `::=`.
    """
    if _GBNF_RULE.search(grammar):
        return inference_pb2.ResponseFormat(gbnf=grammar)
    return inference_pb2.ResponseFormat(lark=grammar)


# The fields of which a request has one at most, in the order in which they are validated.
_FORMS = (
    *("response_format", "structured_outputs", "json_schema", "grammar"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
)


def _is_form(value: object) -> bool:
    is_text = isinstance(value, ResponseFormat) and value.type == "text"
    return value is not None and not is_text


def _sole(value: object, info: ValidationInfo) -> object:
    if _is_form(value):
        for name in _FORMS[: _FORMS.index(str(info.field_name))]:
            if _is_form(info.data.get(name)):
                raise PydanticCustomError(
                    "two_forms",
                    "{other} and {name} both give the answer's form; leave one of them out",
                    {"other": name, "name": info.field_name},
                )
    return value


SOLE = AfterValidator(_sole)


class FormParameters(Parameters):
    """The fields that a request has whose answer may be held to a form."""

    response_format: Annotated[
        ResponseFormat | None,
        BeforeValidator(_without_nesting, json_schema_input_type=ResponseFormat | None),
        SOLE,
    ] = None
    """The form of the answer, as OpenAI's clients ask for it."""
    structured_outputs: Annotated[StructuredOutputs | None, at_most(MAX_OPTIONS), SOLE] = None
    """vLLM's: the form of the answer."""
    json_schema: Annotated[Schema | None, SOLE] = None
    """llama.cpp's: a JSON Schema."""
    grammar: Annotated[Grammar | None, SOLE] = None
    """llama.cpp's: a grammar in its notation."""
    guided_json: Annotated[SchemaOrText | None, SOLE] = None
    """vLLM's older name for `json` in `structured_outputs`."""
    guided_regex: Annotated[Grammar | None, SOLE] = None
    """vLLM's older name for `regex` there."""
    guided_choice: Annotated[Choices | None, SOLE] = None
    """vLLM's older name for `choice` there."""
    guided_grammar: Annotated[Grammar | None, SOLE] = None
    """vLLM's older name for `grammar` there."""
    guided_whitespace_pattern: Never = None
    """vLLM's older name for `whitespace_pattern` there; not supported."""
    structural_tag: Never = None
    """vLLM's older place for `structural_tag`; not supported."""

    @property
    def form_field(self) -> str | None:
        """The name of the field that gives the answer's form; None if there is none."""
        return next((name for name in _FORMS if _is_form(getattr(self, name))), None)

    @property
    def form(self) -> inference_pb2.ResponseFormat | None:
        """The form that the answer is held to; None for any text."""
        form = inference_pb2.ResponseFormat
        match self.form_field:
            case None:
                return None
            case "json_schema":
                return form(json_schema=self.json_schema)
            case "grammar":
                return form(gbnf=self.grammar)
            case "guided_json":
                return form(json_schema=self.guided_json)
            case "guided_regex":
                return form(regex=self.guided_regex)
            case "guided_choice":
                return one_of(self.guided_choice or [])
            case "guided_grammar":
                return grammar_form(self.guided_grammar or "")
            case name:
                nested: ResponseFormat | StructuredOutputs = getattr(self, name)
                return nested.proto()

    def sent_path(self, path: Path) -> Path:
        """Returns the client's path of a parameter, from the path that the service names."""
        name = self.form_field
        if path[:1] != ("response_format",) or name is None:
            return super().sent_path(path)
        field = getattr(self, name)
        if isinstance(field, ResponseFormat):
            inner = ("json_schema", "schema") if field.json_schema is not None else ()
            return (name, *(inner or (("schema",) if field.schema_text is not None else ())))
        if isinstance(field, StructuredOutputs):
            given = next(iter(field.model_dump(by_alias=True, exclude_none=True)))
            return (name, given)
        return (name,)

    def without_prompt(self) -> inference_pb2.GenerateRequest:
        """Returns the call without its prompt, with the form that the answer is held to."""
        request = super().without_prompt()
        if (form := self.form) is not None:
            request.response_format.CopyFrom(form)
        return request
