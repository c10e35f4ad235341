"""Every field of every request has a bound, and a body that breaks all of them costs little."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from serving.errors import InvalidParameter
from serving.gateway.dialect import openai
from serving.gateway.dialect.anthropic.request import CountRequest, MessagesRequest
from serving.gateway.dialect.chat.request import ChatRequest
from serving.gateway.dialect.error_body import error_body
from serving.gateway.dialect.fields import at_most
from serving.gateway.dialect.parsing import read
from serving.gateway.dialect.responses.request import ResponsesRequest
from serving.gateway.dialect.text.request import CompletionRequest
from serving.gateway.dialect.tokens.request import DetokenizeRequest, TokenizeRequest

REQUESTS: list[type[BaseModel]] = [
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    MessagesRequest,
    CountRequest,
    TokenizeRequest,
    DetokenizeRequest,
]
# Bytes of a body; its longest list has half as many members.
BODY = 4 * 2**20
# Kinds of pydantic's schemas that hold no value of their own, by the key of what is in them.
WRAPPERS = {
    "default": "schema",
    "function-after": "schema",
    "function-before": "schema",
    "model": "schema",
    "model-field": "schema",
    "nullable": "schema",
}
HARMLESS = {"bool", "literal", "none"}


def unbounded(kind: type[BaseModel]) -> list[str]:
    """Returns the places in a type's schema of pydantic-core whose values have no bound."""
    schema: Any = kind.__pydantic_core_schema__
    shared = {}
    if schema["type"] == "definitions":
        shared = {own["ref"]: own for own in schema["definitions"]}
        schema = schema["schema"]
    return list(walk(schema, shared))


def walk(
    schema: Any, shared: dict[str, Any], path: str = "", is_refused: bool = False
) -> Iterator[str]:
    """Yields the places in a schema whose values have no bound.

    Args:
        schema: The schema.
        shared: Schemas that it refers to.
        path: The place of it.
        is_refused: Whether a check of `only` refuses every value that could cost something.
    """
    kind = schema["type"]
    if kind in ("str", "list", "dict") and "max_length" not in schema:
        yield f"{path}: {kind} without max_length"
    if kind in ("int", "float") and not {"ge", "le"} <= schema.keys():
        yield f"{path}: {kind} without a range"
    match kind:
        case "model-fields":
            for name, field in schema["fields"].items():
                yield from walk(field, shared, f"{path}.{name}")
        case "list":
            yield from walk(schema["items_schema"], shared, f"{path}[]", is_refused)
        case "dict":
            yield from walk(schema["keys_schema"], shared, f"{path}{{key}}")
            yield from walk(schema["values_schema"], shared, f"{path}{{}}")
        case "union":
            for choice in schema["choices"]:
                yield from walk(choice, shared, path, is_refused)
        case "tagged-union":
            for choice in schema["choices"].values():
                yield from walk(choice, shared, path, is_refused)
        case "definition-ref":  # it must not be recursive: depth has no bound then
            yield from walk(shared[schema["schema_ref"]], shared, path, is_refused)
        case "any" if not is_refused:
            yield f"{path}: any value"
        case _ if kind in WRAPPERS:
            is_refused = is_refused or refuses(schema)
            yield from walk(schema[WRAPPERS[kind]], shared, path, is_refused)
        case _ if kind not in HARMLESS | {"str", "int", "float", "any"}:
            yield f"{path}: {kind} is unknown to this test"


def refuses(schema: Any) -> bool:
    """Returns whether a schema is a check for a feature that is not supported."""
    if schema["type"] != "function-after":
        return False
    name = schema["function"]["function"].__qualname__
    return name.startswith("only.")


@pytest.mark.parametrize("kind", REQUESTS)
def test_every_field_has_a_bound(kind: type[BaseModel]) -> None:
    assert unbounded(kind) == []


def test_the_walk_sees_fields_without_a_bound() -> None:
    class Inner(BaseModel):
        name: str

    class Outer(BaseModel):
        inner: Inner | None = None
        inners: list[Inner] = []
        number: int = 0
        anything: Any = None
        biases: dict[str, float] = {}

    assert [line.partition(":")[0] for line in unbounded(Outer)] == [
        ".inner.name",
        ".inners",
        ".inners[].name",
        ".number",
        ".anything",
        ".biases",
        ".biases{key}",
        ".biases{}",
    ]


@pytest.mark.parametrize("kind", REQUESTS)
def test_wrong_lists_for_every_field_make_few_errors(kind: type[BaseModel]) -> None:
    """A list of 4 MiB makes an error for each field, and not one for each of its members."""
    members = BODY // 4
    for wrong in ([1] * members, [[]] * members, ["x"] * members, [{}] * members, [None] * members):
        with pytest.raises(ValidationError) as raised:
            kind.model_validate({name: wrong for name in kind.model_fields})
        # A few of them are unions, which name what is wrong with each of their forms.
        assert raised.value.error_count() <= len(kind.model_fields) + 2


@pytest.mark.parametrize("kind", REQUESTS)
def test_wrong_maps_for_every_field_make_few_errors(kind: type[BaseModel]) -> None:
    wrong = {f"key {place}": "x" for place in range(100_000)}
    with pytest.raises(ValidationError) as raised:
        kind.model_validate({name: wrong for name in kind.model_fields})
    assert raised.value.error_count() <= len(kind.model_fields) + 2


def test_wrong_lists_inside_messages_make_few_errors() -> None:
    many = BODY // 4
    for message in (
        {"role": "user", "content": [1] * many},
        {"role": "user", "content": [{"type": "text", "text": "x"}] * many},
        {"role": ["x"] * many, "content": ["x"] * many, "tool_calls": [1] * many},
        {"role": "user", "content": "x", "tool_calls": [{}] * 128},
        {"role": "assistant", "tool_calls": [{"function": 1}] * 128},
    ):
        with pytest.raises(ValidationError) as raised:
            ChatRequest.model_validate({"messages": [message] * 2000})
        assert raised.value.error_count() <= 3 * 2000


def test_wrong_items_make_one_error() -> None:
    for item in ([1] * BODY, {"role": "user", "content": [1] * BODY}, {"type": "x" * BODY}):
        with pytest.raises(ValidationError) as raised:
            ResponsesRequest.model_validate({"input": [item] * 4096})
        assert raised.value.error_count() == 1


def test_a_map_is_counted_before_it_is_read() -> None:
    check = at_most(2).func
    assert check({"a": 1, "b": 2}) == {"a": 1, "b": 2}  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="there are 3 members; at most 2"):
        check([1, 2, 3])  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (["x" * 196], ["x" * 196]),  # its JSON has 200 characters
        (["x" * 197], None),
        ([[[1, 2], {"b": 3}]], [[[1, 2], {"b": 3}]]),
        ([[[]] * 300], None),
        ("x" * BODY, None),
    ],
)
def test_a_value_is_shown_if_it_is_short(value: object, shown: object) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "stream_options": '
    with pytest.raises(InvalidParameter) as raised:
        read(
            body + json.dumps(value).encode() + b"}",
            ChatRequest,
            openai.check_unknown,
        )
    detail = error_body(raised.value).detail
    assert isinstance(detail, list)
    assert detail[0]["input"] == shown
