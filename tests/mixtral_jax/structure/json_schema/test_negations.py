"""Negations and conditions: what is accepted is what is valid, over all small objects."""

import itertools
import json
from typing import Any

import pytest

from mixtral_jax.structure.schema import check, read
from tests.mixtral_jax.structure.json_schema.walks import Vocabulary

VALUES = [None, True, False, 0, 1, 2, -1, 1.5, "", "a", "ab", "b", [], {}]
KIND = {"type": "object", "properties": {"k": {}, "n": {}}}
IS_A = {"properties": {"k": {"const": "a"}}}


@pytest.mark.parametrize(
    "refused",
    [
        {"const": "a"},
        {"enum": ["a", "ab", 1, None, True]},
        {"enum": ["", 0, 1]},
        {"type": "integer", "enum": [1, "a"]},
        {"type": "string"},
        {"type": ["null", "boolean"]},
        {"enum": [True, False]},
        True,
        False,
    ],
)
@pytest.mark.parametrize("type_", [None, "string", "integer", "number", ["string", "null"]])
def test_values_that_must_not_be(refused: Any, type_: Any) -> None:
    schema = {"anyOf": [{"not": refused, **({"type": type_} if type_ else {})}, {"const": "spare"}]}
    result = read(json.dumps(schema), strict=True)
    vocabulary = Vocabulary.of_bytes()
    for value in VALUES:
        text = json.dumps(value)
        assert vocabulary.accepts(result, text) == (check(text, result) is None), text


@pytest.mark.parametrize(
    "rules",
    [
        {"if": IS_A, "then": {"required": ["n"]}},
        {"if": {**IS_A, "required": ["k"]}, "then": {"required": ["n"]}},
        {"if": IS_A, "then": {"required": ["n"]}, "else": {"properties": {"n": {"type": "null"}}}},
        {"if": {"properties": {"k": {"enum": ["a", 1]}}}, "else": {"required": ["n"]}},
        {"if": {"required": ["k"]}, "then": {"required": ["n"]}},
        {"if": {"required": ["k"]}, "else": {"properties": {"n": False}}},
        {"if": True, "then": {"required": ["k"]}, "else": False},
        {"allOf": [{"if": IS_A, "then": {"required": ["n"]}}]},
        {"not": {"required": ["n"]}},
        {"dependentRequired": {"k": ["n"]}},
        {"dependentSchemas": {"k": {"properties": {"n": {"type": "null"}}}}},
        {"oneOf": [{"required": ["k"]}, {"required": ["n"]}]},
        {"minProperties": 1},
        {"maxProperties": 1},
    ],
)
def test_rules_about_two_names(rules: dict[str, Any]) -> None:
    result = read(json.dumps({**KIND, **rules}), strict=True)
    vocabulary = Vocabulary.of_bytes()
    absent = object()
    for k, n in itertools.product([absent, "a", "b", 1, None], [absent, None, 1]):
        value = {name: v for name, v in (("k", k), ("n", n)) if v is not absent}
        text = json.dumps(value)
        assert vocabulary.accepts(result, text) == (check(text, result) is None), text
