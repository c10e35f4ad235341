"""Negations that can be written: types, names, and values; and conditions, which need one."""

from typing import Any

from mixtral_jax.structure.json_schema.document import Place
from mixtral_jax.structure.json_schema.keywords import TYPES, is_annotation, kind_of, types_of
from mixtral_jax.structure.json_schema.patterns import UnsupportedPattern, literal
from mixtral_jax.structure.json_schema.report import Mode, Report, Write

_MOST_VALUES = 50
_MOST_CHARACTERS = 100  # of a text that is ruled out


def write_not(place: Place, types: frozenset[str], report: Report) -> Any:
    """Returns a schema that says what must not be: a type, a name, values; else it is listed."""
    refused = place.value["not"]
    if isinstance(refused, bool):
        return not refused
    rules = {key: rule for key, rule in refused.items() if not is_annotation(key)}
    if not rules:
        return False
    if rules.keys() == {"type"}:
        names = types_of(place.below("not")) or ()
        if not ({"integer"} == {*names} & {"integer", "number"} and "number" in types):
            kept = [
                t for t in TYPES if t not in names and (t != "integer" or "number" not in names)
            ]
            kept = [t for t in kept if t in types or (t == "integer" and "number" in types)]
            return {"type": kept} if kept else False
    values = _values(rules)
    if values is not None:
        others = _others(values, types)
        if others is not None:
            return {"anyOf": others} if others else False
    names = rules.get("required", ())
    is_name = rules.keys() <= {"required", "type"} and len(names) == 1
    if is_name and rules.get("type") in (None, "object") and types == {"object"}:
        return {"type": "object", "properties": {names[0]: False}}
    report.weaken(place, "not", "only types, values and single names can be ruled out")
    return True


def write_condition(place: Place, report: Report, write: Write) -> Any:
    """Returns a schema for `if`, `then` and `else`: the first two, or not the first and the last.

    The condition can be that a name has one of some values, or that it is there; else it is listed.
    """
    rules = place.value
    if not {"then", "else"} & rules.keys():
        return True
    if isinstance(rules["if"], bool):
        keyword = "then" if rules["if"] else "else"
        return write(place.below(keyword), Mode(is_composed=True)) if keyword in rules else True
    halves = _split(rules["if"])
    if halves is None or not report.allows(place, "if"):
        if halves is None:
            report.weaken(place, "if", "only the value of one name can be asked for")
        return True
    branches = []
    for keyword, condition in zip(("then", "else"), halves, strict=True):
        result = write(place.below(keyword), Mode(is_composed=True)) if keyword in rules else True
        if result is True:
            branches.append(condition)
        elif result is not False:
            branches.append({"allOf": [condition, result]})
    return {"anyOf": branches} if branches else False


def _split(condition: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Returns a condition as a schema, and its negation; None where they cannot be written."""
    rules = {key: rule for key, rule in condition.items() if not is_annotation(key)}
    names = [*rules.get("properties", {}), *rules.get("required", ())]
    if not rules.keys() <= {"properties", "required"} or len({*names}) != 1:
        return None
    name = names[0]
    is_required = "required" in rules and bool(rules["required"])
    required = {"required": [name]} if is_required else {}
    if not rules.get("properties"):
        return required, {"type": "object", "properties": {name: False}}
    asked = rules["properties"][name]
    values = _values(asked) if isinstance(asked, dict) else None
    others = None if values is None else _others(values, frozenset(TYPES))
    if not others:
        return None
    holds = {"properties": {name: {"enum": values}}, **required}
    fails = {"type": "object", "properties": {name: {"anyOf": others}}}
    if not is_required:
        fails["required"] = [name]
    return holds, fails


def _values(rules: dict[str, Any]) -> list[Any] | None:
    """Returns the values of a schema that says nothing but values, and perhaps their type."""
    rules = {key: rule for key, rule in rules.items() if not is_annotation(key)}
    if len(rules.keys() & {"const", "enum"}) != 1 or not rules.keys() <= {"const", "enum", "type"}:
        return None
    values = rules.get("enum", [rules.get("const")])
    types = rules.get("type", list(TYPES))
    types = [types] if isinstance(types, str) else types
    return [
        v for v in values if kind_of(v) in types or (kind_of(v) == "integer" and "number" in types)
    ]


def _others(values: list[Any], types: frozenset[str]) -> list[Any] | None:
    """Returns schemas that together allow every value of some types but the given ones."""
    kinds = {kind_of(value) for value in values}
    if len(values) > _MOST_VALUES or kinds & {"array", "object", "number"}:
        return None
    rows: list[Any] = [{"type": kind} for kind in ("array", "object") if kind in types]
    if "null" in types and "null" not in kinds:
        rows.append({"type": "null"})
    truths = [v for v in (True, False) if not any(v is value for value in values)]
    if "boolean" in types and truths:
        rows.append({"enum": truths})
    texts = {value for value in values if isinstance(value, str)}
    if "string" in types:
        if any(len(text) > _MOST_CHARACTERS for text in texts):
            return None
        try:
            rows.append({"type": "string"} | ({"pattern": f"^(?:{_no(texts)})$"} if texts else {}))
        except UnsupportedPattern:
            return None
    number = "number" if "number" in types else "integer"
    if number in types:
        numbers = sorted({int(v) for v in values if kind_of(v) == "integer"})
        if any(abs(value) >= 2**53 for value in numbers):
            return None
        edges: list[int | None] = [None, *numbers, None]
        for low, high in zip(edges, edges[1:], strict=False):
            if number == "integer" and low is not None and high is not None and high - low < 2:
                continue
            row: dict[str, Any] = {"type": number}
            if low is not None:
                row["exclusiveMinimum"] = low
            if high is not None:
                row["exclusiveMaximum"] = high
            rows.append(row)
    return rows


def _no(texts: set[str]) -> str:
    """Returns an expression for every text but the given ones."""
    firsts = sorted({text[0] for text in texts if text})
    rows = [] if "" in texts else [""]
    rows.append(f"[^{''.join(map(literal, firsts))}](?s:.*)" if firsts else "(?s:.)(?s:.*)")
    for first in firsts:
        rest = {text[1:] for text in texts if text.startswith(first)}
        rows.append(f"{literal(first)}(?:{_no(rest)})")
    return "|".join(rows)
