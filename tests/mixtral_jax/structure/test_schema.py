"""Reading of JSON Schemas: what is enforced, what is refused and with which pointer."""

import json
from typing import Any

import pytest

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.json_schema.document import MAX_BYTES, STRING, parse
from mixtral_jax.structure.schema import Schema, check, read, read_parameters, settle
from tests.mixtral_jax.structure.json_schema.walks import Vocabulary

OBJECT = {"type": "object"}
CAT = {"type": "object", "properties": {"kind": {"const": "cat", "default": "cat"}}}
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]}
ANCHOR = {"$dynamicAnchor": "a"}
NULL = {"type": "null"}
LOOP = {"type": "array", "items": {"$ref": "#/$defs/loop"}, "minItems": 1}
DEEP: dict[str, Any] = {
    "$defs": {f"d{i}": {"properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(300)}
}
DEEP["$defs"]["d300"] = {}


def of(schema: Any, strict: bool = False) -> Schema:
    return read(json.dumps(schema), strict)


def written(schema: Any) -> Any:
    return json.loads(of(schema, strict=True).text)


@pytest.mark.parametrize(
    ("text", "words", "pointer"),
    [
        ("{", "no JSON", ""),
        ('{"minimum": NaN}', "NaN", ""),
        ('{"minimum": 1e400}', "too large", ""),
        ('{"type": "string", "type": "number"}', "twice", ""),
        ("[1]", "object", ""),
        ("[" * 200 + "]" * 200, "nested", ""),
        ('{"title": "' + "x" * 70_000 + '"}', "longer than 65536", ""),
        ('{"enum": [' + '"xxxx",' * 60_000 + '"x"]}', "256 KB", ""),
        ('{"$schema": "https://example.com/mine"}', "draft", "/$schema"),
        ('{"$ref": "https://example.com/a.json"}', "leads out", "/$ref"),
        ('{"properties": {"a": {"$ref": "#/$defs/b"}}}', "names nothing", "/properties/a/$ref"),
        ('{"properties": []}', "must be an object", "/properties"),
        ('{"$ref": "#"}', "no finite instance", ""),
        ("false", "allows nothing", ""),
        (json.dumps({**DEEP, "$ref": "#/$defs/d0"}), "200 deep", "/$defs/d200"),
        (
            '{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}',
            "no finite instance",
            "/properties/a",
        ),
        ('{"properties": {"a": {"type": "dict"}}}', 'write "object"', "/properties/a/type"),
        ('{"items": {"type": "float"}}', 'write "number"', "/items/type"),
        ('{"type": "tuple"}', 'write "array"', "/type"),
        ('{"type": "any"}', "leave the type out", "/type"),
        ('{"type": "String"}', 'write "string"', "/type"),
    ],
)
def test_what_is_no_schema_is_refused(text: str, words: str, pointer: str) -> None:
    with pytest.raises(StructureError, match=words) as caught:
        read(text)
    assert caught.value.pointer == pointer


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"type": "array", "uniqueItems": True}, "/uniqueItems"),
        ({"type": "array", "contains": {"type": "null"}}, "/contains"),
        ({"properties": {"a/b": {"not": {"minimum": 3}}}}, "/properties/a~1b/not"),
        ({"type": "string", "pattern": r"(a)\1"}, "/pattern"),
        ({"type": "string", "pattern": r"^(?=x)"}, "/pattern"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "/oneOf"),
        ({"oneOf": [OBJECT, {"type": "object", "required": ["a"]}]}, "/oneOf"),
        ({"const": 2**53 + 1}, "/const"),
        ({"type": "object", "minProperties": 2}, "/minProperties"),
        ({"$dynamicRef": "#a", "$defs": {"x": ANCHOR, "y": ANCHOR}}, "/$dynamicRef"),
        ({"type": "object", "patternProperties": {r"\bx": {}}}, r"/patternProperties/\bx"),
        ({"type": "integer", "minimum": 2**70}, "/minimum"),
        ({"type": "string", "minLength": "3"}, "/minLength"),
        ({"type": "object", "required": True}, "/required"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused_or_listed(schema: Any, pointer: str) -> None:
    with pytest.raises(StructureError) as caught:
        of(schema, strict=True)
    assert caught.value.pointer == pointer
    lenient = of(schema)
    assert any(entry.startswith(f"{pointer}: ") for entry in lenient.weakened)


def test_formats_that_are_not_known_are_annotations_also_where_the_caller_is_strict() -> None:
    schema = of({"properties": {"a": {"type": "string", "format": "path"}}}, strict=True)
    assert schema.weakened == ('/properties/a/format: format "path" is an annotation',)
    assert schema.is_enforced


def test_unknown_keywords_are_listed_and_known_annotations_are_not() -> None:
    schema = of({"title": "T", "x-mine": 1, "deprecated": True, "minimumm": 3})
    assert schema.weakened == ("/minimumm: not a keyword of the draft: an annotation",)


@pytest.mark.parametrize(
    ("schema", "result"),
    [
        # Objects are closed, in the order of their names.
        (
            {"type": "object", "properties": {"b": {}, "a": {}}},
            {"type": "object", "properties": {"b": True, "a": True}, "additionalProperties": False},
        ),
        (
            {"properties": {"a": {}}, "additionalProperties": True},
            {"properties": {"a": True}, "additionalProperties": True},
        ),
        # ... but not where they are composed, or require what they do not describe.
        (
            {"properties": {"a": {}}, "required": ["b"]},
            {"properties": {"a": True}, "required": ["b"]},
        ),
        (
            {"properties": {"a": {}}, "allOf": [{"properties": {"b": {}}}]},
            {"properties": {"a": True}, "allOf": [{"properties": {"b": True}}]},
        ),
        # Names asked for beside an object are its own.
        (
            {
                "type": "object",
                "properties": {"a": {}, "b": {}},
                "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
            },
            {
                "type": "object",
                "properties": {"a": True, "b": True},
                "additionalProperties": False,
                "anyOf": [
                    {"properties": {"b": False}, "required": ["a"]},
                    {"properties": {"a": False}, "required": ["b"]},
                ],
            },
        ),
        # A tag with a default is required, and then tells the branches apart.
        (
            {"oneOf": [CAT, DOG], "discriminator": {"propertyName": "kind"}},
            {
                "anyOf": [
                    {
                        "type": "object",
                        "properties": {"kind": {"const": name}},
                        "required": ["kind"],
                        "additionalProperties": False,
                    }
                    for name in ("cat", "dog")
                ]
            },
        ),
        ({"oneOf": [{"type": "string"}, NULL]}, {"anyOf": [{"type": "string"}, NULL]}),
        ({"type": "array", "uniqueItems": False}, {"type": "array"}),
        ({"type": "array", "maxItems": 1, "uniqueItems": True}, {"type": "array", "maxItems": 1}),
        # Draft 7: items in a list, nothing beside $ref, dependencies.
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array",
             "items": [{"type": "null"}], "additionalItems": False},
            {"type": "array", "prefixItems": [{"type": "null"}], "items": False},
        ),
        (
            {"type": "object", "dependencies": {"a": ["b"]}},
            {"type": "object", "anyOf": [{"type": "object", "required": ["a", "b"]},
                                         {"type": "object", "properties": {"a": False}}]},
        ),
        (
            {"type": "object", "required": ["a"], "dependentRequired": {"a": ["b"]}},
            {"type": "object", "required": ["a"],
             "allOf": [{"type": "object", "required": ["b"]}]},
        ),
        # Bounds of 64 bits are moved inwards; zod's are exact.
        ({"type": "integer", "maximum": 2**53 - 1}, {"type": "integer", "maximum": 2**53 - 1}),
        ({"type": "integer", "maximum": 2**63 - 1}, {"type": "integer", "maximum": 2**63 - 1024}),
        # A record of zod, and names from a list.
        ({"type": "object", "propertyNames": {"type": "string"}}, {"type": "object"}),
        (
            {"type": "object", "propertyNames": {"enum": ["a"]}, "additionalProperties": NULL},
            {"type": "object", "properties": {"a": NULL}, "additionalProperties": False},
        ),
        ({"not": {"type": ["object", "array"]}},
         {"type": ["null", "boolean", "integer", "number", "string"]}),
        ({"type": "string", "maxLength": 2**53 - 1, "default": "x"}, {"type": "string"}),
        # A part without a finite instance is not begun.
        (
            {"type": "object", "properties": {"a": {"$ref": "#/$defs/loop"}},
             "$defs": {"loop": LOOP}},
            {"type": "object", "properties": {"a": False}, "additionalProperties": False},
        ),
    ],
)  # fmt: skip
def test_rewriting(schema: Any, result: Any) -> None:
    assert written(schema) == result
    if "properties" in result:
        assert list(written(schema)["properties"]) == list(result["properties"])


def test_options_of_the_grammar_are_not_the_clients() -> None:
    schema = {
        "properties": {"a": {"x-guidance": {"lenient": True}}},
        "x-guidance": {"lenient": True},
    }
    assert "guidance" not in of(schema).text


def test_a_closed_branch_is_not_valid_under_an_open_one() -> None:
    """The first branch allows any name; a proof by its closed form would be no proof."""
    first = {"type": "object", "properties": {"a": {}}}
    second = {"type": "object", "properties": {"b": {}}, "required": ["b"]}
    assert not of({"oneOf": [first, second]}).is_enforced
    first["required"] = ["a"]
    assert of({"oneOf": [first, second]}).is_enforced


def test_references_are_followed_by_pointer_address_and_anchor() -> None:
    schema = {
        "$id": "https://example.com/root",
        "type": "array",
        "prefixItems": [{"$ref": "#/$defs/a%25b~1c"}, {"$ref": "#here"}, {"$ref": "other"}],
        "$defs": {
            "a%b/c": {"const": 1},
            "x": {"$anchor": "here", "const": 2},
            "y": {"$id": "other", "const": 3},
        },
    }
    result = written(schema)
    names = [item["$ref"].rpartition("/")[2] for item in result["prefixItems"]]
    assert [result["$defs"][name]["const"] for name in names] == [1, 2, 3]


def test_parameters_are_objects() -> None:
    assert json.loads(read_parameters("").text) == {
        "type": "object",
        "additionalProperties": False,
    }
    assert json.loads(read_parameters('{"properties": {"a": {}}}').text)["type"] == "object"
    with pytest.raises(StructureError) as caught:
        read_parameters('{"type": "array"}')
    assert caught.value.pointer == "/type"
    with pytest.raises(StructureError, match="object"):
        read_parameters("true")


def test_rules_whose_grammar_is_refused_are_found() -> None:
    vocabulary = Vocabulary.of_bytes()
    tried = []

    def attempt(schema: Schema) -> None:
        tried.append(schema)
        vocabulary.matcher(schema)

    pattern = {"type": "string", "format": "date", "maxLength": 3}  # no date is that short
    good = {"type": "string", "format": "date", "maxLength": 10}
    text = json.dumps({"type": "object", "properties": {"a": good, "b": pattern, "c": good},
                       "required": ["a", "b", "c"]})  # fmt: skip
    schema = settle(text, attempt)
    assert [entry.partition(":")[0] for entry in schema.weakened] == ["/properties/b/format"]
    assert not schema.is_enforced
    assert len(tried) < 10
    with pytest.raises(StructureError) as caught:
        settle(text, attempt, strict=True)
    assert caught.value.pointer == "/properties/b/format"
    short = {"minLength": 3, "maxLength": 2, "type": "string"}
    nothing = {"type": "object", "properties": {"a": short}, "required": ["a"]}
    with pytest.raises(StructureError) as caught:
        settle(json.dumps(nothing), attempt)
    assert caught.value.pointer == "/properties/a/minLength"
    # The reason is that of the innermost part, not that of the object around it.
    assert "minLength (3) is greater than maxLength (2)" in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "answer", "is_valid"),
    [
        ({"type": "array", "uniqueItems": True}, "[1, true, [1], [true]]", True),
        ({"type": "array", "uniqueItems": True}, "[1, 1.0]", False),
        ({"type": "array", "uniqueItems": True}, '[{"a": 1, "b": 2}, {"b": 2, "a": 1}]', False),
        ({"type": "number", "multipleOf": 0.01}, "0.07", True),
        ({"type": "number", "multipleOf": 0.01}, "0.071", False),
        ({"type": "integer"}, "1.0", True),
        ({"type": "string", "pattern": r"^(?!x)"}, '"x"', False),
        ({"type": "string", "pattern": r"^(a|a)*(?=b)$"}, '"' + "a" * 60 + '"', False),
        ({"format": "email"}, '"nobody"', True),
        ({}, "{", False),
        ({}, "NaN", False),
        ({}, "[" * 300 + "]" * 300, False),
        ({"const": {"a": [1]}}, '{"a": [1.0]}', True),
    ],
)
def test_finished_answers(schema: Any, answer: str, is_valid: bool) -> None:
    assert (check(answer, of(schema)) is None) == is_valid


def test_a_check_ends_in_time() -> None:
    """Each level doubles the ways to look at the next; the answer is 60 levels deep."""
    branch = {"type": "array", "items": {"$ref": "#"}, "contains": {"type": "null"}}
    schema = of({"anyOf": [branch, {**branch, "minItems": 1}, {"type": "null"}]})
    wrong = check("[" * 60 + "1" + "]" * 60, schema)
    assert wrong == "the answer could not be checked in time"


def test_a_text_that_is_no_json_is_looked_at_once() -> None:
    """Each quote of a string that never ends could begin one: in 256 KB of them that is minutes."""
    text = '"' + '\\"' * 100_000
    assert len(text) < MAX_BYTES and len(STRING.findall(text)) == 1
    with pytest.raises(StructureError):
        parse(text)
    twice = "{" + ",".join(f'"{i}": 1' for i in range(20_000)) + ', "19999": 1}'
    with pytest.raises(StructureError, match="'19999' twice"):
        parse(twice)
