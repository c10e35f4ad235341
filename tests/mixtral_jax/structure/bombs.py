"""Schemas, grammars and expressions that overflow, exhaust or stall a compiler of grammars."""

import json
from typing import Any

from mixtral_jax.structure.specification import Kind, Specification


def schema(value: Any) -> Specification:
    return Specification(Kind.JSON_SCHEMA, json.dumps(value))


def regex(text: str) -> Specification:
    return Specification(Kind.REGEX, text)


def lark(text: str) -> Specification:
    return Specification(Kind.LARK, text)


def gbnf(text: str) -> Specification:
    return Specification(Kind.GBNF, text)


def references(length: int) -> dict[str, Any]:
    """A chain of definitions, each of which refers to the next."""
    definitions: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{length}": {"type": "null"}}}


def properties(count: int, *, required: bool) -> dict[str, Any]:
    named = {f"p{i}": {"type": "integer"} for i in range(count)}
    return {"type": "object", "properties": named, "required": list(named) if required else []}


def doubled(times: int) -> dict[str, Any]:
    """Definitions, each of which uses the next twice: 2^times when written out."""
    definitions: dict[str, Any] = {
        f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2}
        for i in range(times)
    }
    return {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{times}": {"type": "null"}}}


def crossed(times: int) -> dict[str, Any]:
    """An allOf of anyOf with two branches each: 2^times combinations."""
    pairs = [
        {
            "anyOf": [
                {"properties": {f"a{i}": {"const": 1}}},
                {"properties": {f"b{i}": {"const": 1}}},
            ]
        }
        for i in range(times)
    ]
    return {"type": "object", "allOf": pairs}


def chain(length: int) -> str:
    rules = "\n".join(f"r{i}: r{i + 1}" for i in range(length))
    return f'start: r0\n{rules}\nr{length}: "x"'


def terminals(length: int) -> str:
    rules = "\n".join(f"R{i}: R{i + 1}" for i in range(length))
    return f'start: R0\n{rules}\nR{length}: "x"'


NESTED = '{"items": ' * 5000 + "{}" + "}" * 5000
BOMBS = {
    "references 1,000": schema(references(1000)),
    "references 3,000": schema(references(3000)),
    "references 5,000": schema(references(5000)),
    "reference to itself": schema({"$ref": "#"}),
    "references in a circle": schema(
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    ),
    "recursion without an end": schema(
        {"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}
    ),
    "nested 5,000 deep": Specification(Kind.JSON_SCHEMA, NESTED),
    "brackets 100,000 deep": Specification(Kind.JSON_SCHEMA, "[" * 100_000),
    "1,000 optional properties": schema(properties(1000, required=False)),
    "1,000 required properties": schema(properties(1000, required=True)),
    "8,000 properties": schema(properties(8000, required=False)),
    "enum of 1,000": schema({"enum": list(range(1000))}),
    "enum of 20,000": schema({"enum": [f"v{i}" for i in range(20_000)]}),
    "allOf of anyOf 2^12": schema(crossed(12)),
    "allOf of anyOf 2^20": schema(crossed(20)),
    "doubled 30 times": schema(doubled(30)),
    "const of 200 KB": schema({"const": "x" * 200_000}),
    "const of 60 KB": schema({"const": "x" * 60_000}),
    "minItems 1e6": schema({"type": "array", "minItems": 1_000_000}),
    "maxLength 1e6": schema({"type": "string", "maxLength": 1_000_000}),
    "minLength 1e5": schema({"type": "string", "minLength": 100_000}),
    "maximum 1e300": schema({"type": "integer", "minimum": -(10**300), "maximum": 10**300}),
    "multipleOf": schema({"type": "integer", "multipleOf": 999_983}),
    "multipleOf small": schema({"type": "number", "multipleOf": 1e-9}),
    "number of 5,000 digits": Specification(Kind.JSON_SCHEMA, '{"const": ' + "9" * 5000 + "}"),
    "pattern that nests": schema({"type": "string", "pattern": "((a{100}){100}){100}"}),
    "pattern and length": schema(
        {"type": "string", "pattern": "^(.*a.{15}.*)$", "maxLength": 10_000}
    ),
    "1,000 patterns": schema(
        {
            "type": "object",
            "patternProperties": {f"^{i}.*x{{50}}": {"type": "null"} for i in range(1000)},
        }
    ),
    "repetition of repetition": regex("((a{100}){100}){100}"),
    "nested plus": regex("(a+)+b"),
    "bounds of bounds": regex("(a{1,1000}){1,1000}"),
    "dots": regex(".{0,50000}"),
    "suffix": regex("(a|b)*a(a|b){20}"),
    "suffix of words": regex("(.*a.{12}.*)"),
    "many words": regex("|".join(f"w{i}.*x{{30}}" for i in range(3000))),
    "unicode classes": regex(r"(\p{L}\p{N}){500}"),
    "case": regex("(?i)" + "straße" * 5000),
    "parentheses": regex("(" * 30_000 + ")" * 30_000),
    "regex of 100 KB": regex("a" * 100_000),
    "choices 4,000": Specification(Kind.CHOICE, choices=tuple(f"c{i}" for i in range(4000))),
    "choices 100,000": Specification(Kind.CHOICE, choices=tuple(map(str, range(100_000)))),
    "rules 1,000": lark(chain(1000)),
    "rules 3,000": lark(chain(3000)),
    "terminals 3,000": lark(terminals(3000)),
    "and not": lark("start: A\nA: /(.*a.{12}.*)/ & /(.*b.{12}.*)/ & ~/(.*c.{13}.*)/"),
    "alternatives 8,000": lark("start: " + " | ".join(f'"{i}"' for i in range(8000))),
    "alternatives 70,000": lark("start: " + " | ".join(f'"{i}"' for i in range(70_000))),
    "parentheses of Lark": lark("start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
    "left recursion": lark('start: start "x"'),
    "recursion of Lark": lark('start: "x" start'),
    "empty recursion": lark('start: a*\na: b*\nb: a | ""'),
    "ambiguous": lark('start: s\ns: s s | s s s | "a"'),
    "repeated 1e9": lark('start: "a"~1..1000000000'),
    "repeated rules": lark('start: a{1000}\na: b{1000}\nb: c{1000}\nc: "x"'),
    "ignored nothing": lark('start: "a"\n%ignore /x*/'),
    "substring": lark('start: %regex {"substring_chars": ' + json.dumps("ab" * 20_000) + "}"),
    "schema in Lark": lark("start: %json " + json.dumps(references(900))),
    "gbnf chain": gbnf("root ::= r0\n" + chain(2500).partition("\n")[2].replace(":", " ::=")),
    "gbnf parentheses": gbnf("root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000),
    "gbnf repetition": gbnf("root ::= a{1000}\na ::= b{1000}\nb ::= [a-z]{1000}"),
    "gbnf left recursion": gbnf('root ::= root "x" | "y"'),
}
