"""Keywords of JSON Schema: which are rules, which say nothing about an instance, and their forms.

https://json-schema.org/draft/2020-12/json-schema-validation
"""

from typing import Any

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.json_schema.document import Place, point
from mixtral_jax.structure.json_schema.report import Report

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
# Names of types in other languages, which clients send by mistake.
_TYPES_ELSEWHERE = {
    **{"dict": "object", "map": "object", "record": "object", "struct": "object"},
    **{"float": "number", "double": "number", "decimal": "number", "numeric": "number"},
    **{"int": "integer", "long": "integer", "int32": "integer", "int64": "integer"},
    **{"str": "string", "text": "string", "char": "string", "bool": "boolean"},
    **{"list": "array", "tuple": "array", "set": "array", "none": "null", "nil": "null"},
}

# Rules that stand for whole schemas of the same instance.
IN_PLACE = frozenset(
    {
        *("$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "not"),
        *("if", "dependentSchemas", "dependencies", "dependentRequired"),
    }
)
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = frozenset(
    {
        *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
        *("minContains", "maxContains"),
    }
)
_SCHEMAS = frozenset(
    {
        *("not", "if", "then", "else", "contains", "propertyNames", "additionalProperties"),
        *("additionalItems", "unevaluatedItems", "unevaluatedProperties"),
    }
)
_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_MAPS = frozenset({"properties", "patternProperties", "dependentSchemas", "dependencies"})
_TEXTS = frozenset({"$ref", "$dynamicRef", "$recursiveRef", "pattern", "format"})
RULES = frozenset(
    {
        *(*IN_PLACE, *NUMBERS, *_COUNTS, *_SCHEMAS, *_LISTS, *_MAPS, *_TEXTS),
        *("type", "enum", "const", "items", "required", "uniqueItems"),
    }
)
_NEEDED = frozenset({"$ref", "properties", "items", "allOf", "anyOf", "oneOf"})
# Keywords of the drafts that say nothing about an instance, and those of OpenAPI and pydantic.
_ANNOTATIONS = frozenset(
    {
        *("$schema", "$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$vocabulary"),
        *("$defs", "definitions", "$comment", "title", "description", "default", "examples"),
        *("example", "deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType"),
        *(
            "contentSchema",
            "discriminator",
            "externalDocs",
            "xml",
            "enumNames",
            "markdownDescription",
        ),
    }
)
# Rules of newer drafts that older ones do not know.
_NEWER = {
    "draft4": frozenset({"const", "contains", "propertyNames", "if", "then", "else"}),
    "draft6": frozenset({"if", "then", "else"}),
    "draft7": frozenset[str](),
}
_SINCE_2019 = frozenset(
    {
        *("dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
        *("minContains", "maxContains", "$recursiveRef"),
    }
)


def is_rule(keyword: str, draft: str) -> bool:
    """Returns True for a keyword that says something about an instance in a draft."""
    if draft in _NEWER and (keyword in _NEWER[draft] or keyword in _SINCE_2019):
        return False
    if keyword in ("prefixItems", "$dynamicRef") and draft != "draft2020-12":
        return False
    if keyword == "$recursiveRef" and draft != "draft2019-09":
        return False
    return keyword in RULES


def is_annotation(keyword: str) -> bool:
    """Returns True for a keyword that is known to say nothing about an instance."""
    return keyword in _ANNOTATIONS or keyword.startswith("x-")


def fault(keyword: str, value: Any, draft: str) -> str | None:
    """Returns what is wrong with the form of a keyword's value, or None."""
    if keyword in _COUNTS:
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return None if whole else "must be a whole number, 0 or more"
    if keyword in _SCHEMAS:
        return None if isinstance(value, dict | bool) else "must be a schema"
    if keyword in NUMBERS:
        if keyword.startswith("exclusive") and isinstance(value, bool):
            return None if draft == "draft4" else "must be a number, since draft 6"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if keyword == "multipleOf" and number and value <= 0:
            return "must be more than 0"
        return None if number else "must be a number"
    if keyword in _LISTS:
        return None if isinstance(value, list) and value else "must be a list of schemas"
    if keyword in _MAPS:
        return None if isinstance(value, dict) else "must be an object"
    if keyword in _TEXTS:
        return None if isinstance(value, str) else "must be a string"
    if keyword == "uniqueItems":
        return None if isinstance(value, bool) else "must be true or false"
    if keyword == "enum":
        return None if isinstance(value, list) else "must be a list"
    if keyword == "items":
        return None if isinstance(value, dict | bool | list) else "must be a schema"
    if keyword == "required":
        texts = isinstance(value, list) and all(isinstance(name, str) for name in value)
        return None if texts else "must be a list of names"
    if keyword == "dependentRequired" and not (
        isinstance(value, dict) and all(fault("required", v, draft) is None for v in value.values())
    ):
        return "must be an object of lists of names"
    return None


def vet(report: Report, place: Place, draft: str) -> None:
    """Checks the forms of a schema's keywords: a wrong one is listed and taken out.

    Raises StructureError where the caller is strict, and where nothing can be made of it.
    """
    types_of(place)
    for keyword in list(place.value):
        wrong = fault(keyword, place.value[keyword], draft)
        if wrong is None:
            continue
        if report.strict or keyword in _NEEDED:
            raise StructureError(f'"{keyword}" {wrong}', point(place.pointer, keyword))
        report.note(place, keyword, f"left out, because it {wrong}")
        del place.value[keyword]


def types_of(place: Place) -> tuple[str, ...] | None:
    """Returns the types that a schema's `type` allows, or None if it has none.

    Raises StructureError for a name that is no type of JSON, with the right name where it is known.
    """
    value = place.value.get("type")
    if value is None and "type" not in place.value:
        return None
    names = value if isinstance(value, list) else [value]
    for name in names:
        if name not in TYPES:
            right = _TYPES_ELSEWHERE.get(str(name).lower())
            if right is None and str(name).lower() in TYPES:
                right = str(name).lower()
            remedy = f'write "{right}"' if right else f"the types are {', '.join(TYPES)}"
            if str(name).lower() == "any":
                remedy = "leave the type out"
            raise StructureError(
                f"{str(name)[:60]!r} is no type of JSON Schema; {remedy}",
                point(place.pointer, "type"),
            )
    return tuple(name for name in names if name != "integer" or "number" not in names)


def kind_of(value: Any) -> str:
    """Returns the type of a JSON value; an integer is "integer"."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) or value.is_integer() else "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def same(first: Any, second: Any) -> bool:
    """Returns True if two values are equal as JSON: 1 equals 1.0, and true does not equal 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    return bool(first == second)
