"""Schemas made by a seeded walk over types, keywords and nesting, as clients could send them."""

import random
from typing import Any

NAMES = ("id", "name", "kind", "tags", "next", "größe", 'a"b', "x/y", "m~n", "the value")
PATTERNS = (
    r"^[a-z]+$",
    r"^\d{3}-\d{4}$",
    "foo",
    r"^[A-Z][a-z]*( [A-Z][a-z]*)*$",
    r"^#?[0-9a-fA-F]{6}$",
    r"^(?!x)[a-z]+$",
    r"\bword\b",
    r"^a|b$",
    r"^\S+@\S+\.\w{2,}$",
    r"^https?://",
    r"^v\d+(\.\d+){0,2}$",
)
FORMATS = (
    *("date", "time", "date-time", "email", "uuid", "uri", "ipv4", "hostname", "duration"),
    *("path", "binary", "int32", "password", "regex", "json-pointer", "color"),
)
CONSTANTS = ("a", "b", "red", "", 0, 1, -7, 2.5, True, False, None, [1, "x"], {"k": 1}, 2**53 + 1)


class Maker:
    """Maker of one schema, whose definitions may refer to each other."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._definitions: dict[str, Any] = {}
        self._count = self._random.choice((0, 0, 0, 1, 2, 3))

    def schema(self) -> dict[str, Any]:
        """Returns a schema of an object, with its definitions."""
        root = self._object(3)
        for number in range(self._count):
            root.setdefault("$defs", {})[f"d{number}"] = self._any(2)
        if self._random.random() < 0.1:
            root["$schema"] = "http://json-schema.org/draft-07/schema#"
        return root

    def _flip(self, chance: float) -> bool:
        return self._random.random() < chance

    def _any(self, depth: int) -> Any:
        kinds = ["string"] * 4 + ["integer", "number", "boolean", "enum", "const", "null", "true"]
        if depth > 0:
            kinds += ["object"] * 4 + ["array"] * 3
            kinds += ["anyOf", "oneOf", "tagged", "allOf", "not", "types", "condition"]
        if self._count:
            kinds += ["ref"] * 2
        kind = self._random.choice(kinds)
        schema = getattr(self, f"_{kind}")(depth)
        if isinstance(schema, dict) and self._flip(0.2):
            schema["description"] = "What this is."
        return schema

    def _string(self, _depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string"}
        if self._flip(0.2):
            schema["minLength"] = self._random.randint(0, 4)
        if self._flip(0.2):
            schema["maxLength"] = self._random.randint(4, 12)
        if self._flip(0.15):
            schema["pattern"] = self._random.choice(PATTERNS)
        elif self._flip(0.2):
            schema["format"] = self._random.choice(FORMATS)
        return schema

    def _number(self, _depth: int, kind: str = "number") -> dict[str, Any]:
        schema: dict[str, Any] = {"type": kind}
        values = [self._random.choice((0, 1, -3, 10, 0.5, 100, 1e6)) for _ in range(2)]
        if self._flip(0.3):
            schema[self._random.choice(("minimum", "exclusiveMinimum"))] = min(values)
        if self._flip(0.3):
            schema[self._random.choice(("maximum", "exclusiveMaximum"))] = max(values) + 5
        if self._flip(0.1):
            schema["multipleOf"] = self._random.choice((1, 2, 5, 0.5, 0.01))
        return schema

    def _integer(self, depth: int) -> dict[str, Any]:
        schema = self._number(depth, "integer")
        if self._flip(0.1):
            schema |= {"minimum": -(2**53) + 1, "maximum": 2**53 - 1}
        return schema

    def _boolean(self, _depth: int) -> dict[str, Any]:
        return {"type": "boolean"}

    def _null(self, _depth: int) -> dict[str, Any]:
        return {"type": "null"}

    def _true(self, _depth: int) -> Any:
        return self._random.choice((True, {}, {"title": "Anything"}))

    def _enum(self, _depth: int) -> dict[str, Any]:
        values = self._random.sample(CONSTANTS[:11], self._random.randint(1, 4))
        return {"enum": values} if self._flip(0.5) else {"type": "string", "enum": ["x", "y", "zz"]}

    def _const(self, _depth: int) -> dict[str, Any]:
        return {"const": self._random.choice(CONSTANTS)}

    def _ref(self, _depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"$ref": f"#/$defs/d{self._random.randrange(self._count)}"}
        if self._flip(0.1):
            schema["default"] = None
        return schema

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(NAMES, self._random.randint(0, 4))
        schema: dict[str, Any] = {"type": "object"}
        schema["properties"] = {name: self._any(depth - 1) for name in names}
        required = [name for name in names if self._flip(0.5)]
        if required or self._flip(0.2):
            schema["required"] = required
        if self._flip(0.05):
            schema["required"] = [*required, "beyond"]
        if self._flip(0.4):
            schema["additionalProperties"] = self._random.choice(
                (False, False, True, {"type": "integer"})
            )
        if self._flip(0.06):
            schema["patternProperties"] = {"^x-": self._any(0)}
        if self._flip(0.06):
            schema[self._random.choice(("minProperties", "maxProperties"))] = self._random.randint(
                1, 3
            )
        if self._flip(0.05) and len(names) > 1:
            schema["dependentRequired"] = {names[0]: [names[1]]}
        if self._flip(0.03) and len(names) > 1:
            schema["dependentSchemas"] = {names[0]: {"required": [names[1]]}}
        if self._flip(0.05):
            schema["propertyNames"] = self._random.choice(
                (
                    {"type": "string"},
                    {"pattern": "^[a-z ]+$"},
                    {"maxLength": 8},
                    {"enum": ["id", "q"]},
                )
            )
        if self._flip(0.04):
            schema["unevaluatedProperties"] = False
        if self._flip(0.06) and len(names) > 1:
            keyword = self._random.choice(("anyOf", "oneOf"))
            schema[keyword] = [{"required": [name]} for name in names[:2]]
        free = [name for name in names if name not in required]
        if self._flip(0.1) and free:
            schema["not"] = {"required": [free[0]]}
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "array", "items": self._any(depth - 1)}
        if self._flip(0.2):
            schema["prefixItems"] = [
                self._any(depth - 1) for _ in range(self._random.randint(1, 2))
            ]
        if self._flip(0.2):
            schema["minItems"] = self._random.randint(0, 2)
        if self._flip(0.3):
            schema["maxItems"] = self._random.randint(2, 4)
        if self._flip(0.1):
            schema["uniqueItems"] = self._flip(0.5)
        if self._flip(0.04):
            schema["contains"] = self._any(0)
        return schema

    def _anyOf(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._any(depth - 1) for _ in range(self._random.randint(1, 3))]}

    def _oneOf(self, depth: int) -> dict[str, Any]:
        return {"oneOf": [self._any(depth - 1) for _ in range(self._random.randint(1, 3))]}

    def _allOf(self, depth: int) -> dict[str, Any]:
        parts = [self._object(depth - 1) for _ in range(self._random.randint(1, 2))]
        for schema in parts:
            schema.pop("additionalProperties", None)
        return {"allOf": parts}

    def _tagged(self, depth: int) -> dict[str, Any]:
        """As pydantic writes a union that a field tells apart; the field may have a default."""
        branches = []
        for tag in ("cat", "dog", "fish")[: self._random.randint(2, 3)]:
            branch = self._object(depth - 1)
            branch.pop("unevaluatedProperties", None)
            tag_schema = {"const": tag, "type": "string"}
            branch["properties"] = {"kind": tag_schema, **branch["properties"]}
            branch["properties"]["kind"] = tag_schema
            if self._flip(0.5):
                tag_schema["default"] = tag
            else:
                branch["required"] = ["kind", *branch.get("required", [])]
            branches.append(branch)
        return {"oneOf": branches, "discriminator": {"propertyName": "kind"}}

    def _not(self, _depth: int) -> dict[str, Any]:
        return {
            "type": "string",
            "not": self._random.choice(
                ({"const": "x"}, {"enum": ["", "ab", "ac"]}, {"pattern": "x"})
            ),
        }

    def _types(self, depth: int) -> dict[str, Any]:
        schema = self._any(depth - 1)
        if not isinstance(schema, dict) or not isinstance(schema.get("type"), str):
            return {"type": ["string", "null"]}
        return {**schema, "type": [schema["type"], "null"]}

    def _condition(self, depth: int) -> dict[str, Any]:
        schema = self._object(depth - 1)
        schema["properties"]["kind"] = {"enum": ["a", "b", 1, None, False]}
        value = self._random.choice(("a", 1, None, False))
        schema["if"] = {"properties": {"kind": {"const": value}}}
        if self._flip(0.5):
            schema["if"]["required"] = ["kind"]
        schema["then"] = {"required": ["name"]}
        if self._flip(0.5):
            schema["else"] = {"properties": {"id": {"type": "null"}}}
        return schema
