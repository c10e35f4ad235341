"""Rules for objects: which are closed, and what of the names can be enforced."""

import re
from typing import Any

from mixtral_jax.structure.json_schema.document import Place
from mixtral_jax.structure.json_schema.keywords import IN_PLACE
from mixtral_jax.structure.json_schema.patterns import UnsupportedPattern, translate
from mixtral_jax.structure.json_schema.report import Mode, Report, Write
from mixtral_jax.structure.json_schema.scalars import MOST

_CONTROL = re.compile("[\x00-\x1f\x7f]")


def closes(place: Place, mode: Mode) -> bool:
    """Returns True for an object that is written without other names than those it describes.

    It says nothing about other names, and nothing else does: what it allows when it is closed is
    valid, and a function that is called with these names knows them all.
    """
    rules = place.value
    if "properties" not in rules or mode.is_composed:
        return False
    if {"additionalProperties", "unevaluatedProperties"} & rules.keys():
        return False
    names = rules["properties"].keys()
    if not names >= {*rules.get("required", ())} or rules.get("minProperties", 0) > len(names):
        return False
    return all(only_requires(place.below(keyword), names) for keyword in IN_PLACE & rules.keys())


def only_requires(place: Place, names: Any) -> bool:
    """Returns True if a rule beside an object asks only for some of the given names."""
    value = place.value
    keyword = place.pointer.rpartition("/")[2]
    if keyword in ("anyOf", "oneOf", "allOf"):
        branches = value
    elif keyword == "dependentRequired":
        return all(names >= {*needed} for needed in value.values())
    elif keyword == "not":
        branches = [value]
    else:
        return False
    return all(
        isinstance(branch, dict)
        and branch.keys() <= {"required", "title", "description", "type"}
        and names >= {*branch.get("required", ())}
        for branch in branches
    )


def write_object(
    place: Place, types: frozenset[str], mode: Mode, report: Report, write: Write
) -> dict[str, Any]:
    """Returns the rules for objects."""
    if "object" not in types:
        return {}
    rules = place.value
    out: dict[str, Any] = {}
    is_closed = closes(place, mode)
    beside = IN_PLACE & rules.keys()
    inner = Mode(is_composed=mode.is_composed or (bool(beside) and not is_closed))
    names = rules.get("properties", {})
    if names or mode.exclude:
        out["properties"] = {name: write(place.below("properties", name), inner) for name in names}
        out["properties"].update(dict.fromkeys(mode.exclude, False))
    required = [*dict.fromkeys([*rules.get("required", ()), *mode.require])]
    if required:
        out["required"] = required
    if is_closed:
        out["additionalProperties"] = False
    elif "additionalProperties" in rules:
        out["additionalProperties"] = write(place.below("additionalProperties"), inner)
    _write_patterns(place, out, inner, report, write)
    _write_unevaluated(place, out, inner, report, write)
    if "propertyNames" in rules:
        _write_names(place, out, report)
    _write_counts(place, out, bool(beside) or mode.is_composed, report)
    if out.get("additionalProperties", True) is not False:
        for name in names:
            if _CONTROL.search(name):
                report.weaken(place, "properties", f"the name {name!r} can be written in two ways")
                break
    return out


def _write_patterns(
    place: Place, out: dict[str, Any], inner: Mode, report: Report, write: Write
) -> None:
    patterns = place.value.get("patternProperties")
    if not patterns or not report.allows(place, "patternProperties", is_risky=len(patterns) > 1):
        if patterns:
            out.pop("additionalProperties", None)
        return
    written = {}
    for pattern in patterns:
        try:
            key = translate(pattern)
        except UnsupportedPattern as error:
            report.weaken(place.below("patternProperties"), pattern, f"it has {error}")
            out.pop("additionalProperties", None)  # which would be asked of these names too
            continue
        written[key] = write(place.below("patternProperties", pattern), inner)
    if written:
        out["patternProperties"] = written


def _write_unevaluated(
    place: Place, out: dict[str, Any], inner: Mode, report: Report, write: Write
) -> None:
    rules = place.value
    if rules.get("unevaluatedProperties", True) in (True, {}) or "additionalProperties" in rules:
        return
    if {*IN_PLACE} & rules.keys():
        report.weaken(place, "unevaluatedProperties", "other schemas stand beside it")
    else:
        out["additionalProperties"] = write(place.below("unevaluatedProperties"), inner)


def _write_names(place: Place, out: dict[str, Any], report: Report) -> None:
    """Writes `propertyNames` as the names and patterns of an object that has no others."""
    names = place.value["propertyNames"]
    if isinstance(names, dict):
        known = {"type", "enum", "const", "pattern", "minLength", "maxLength"}
        about = {"title", "description", "$comment", "examples", "default"}
        is_text = names.get("type", "string") in ("string", ["string"])
        if not is_text or not names.keys() <= known | about:
            report.weaken(place, "propertyNames", "it says more than a pattern or a list of names")
            return
        names = {key: value for key, value in names.items() if key in known - {"type"}}
    if names is True or not names and names is not False:
        return
    rest = out.get("additionalProperties", True)
    own = out.get("properties", {})
    if names is False or {"enum", "const"} & names.keys():
        values = [] if names is False else names.get("enum", [names.get("const")])
        if (names and len(names) > 1) or "patternProperties" in out:
            report.weaken(place, "propertyNames", "other rules about names stand beside it")
            return
        allowed = [value for value in values if isinstance(value, str)]
        out["properties"] = {n: s if n in allowed else False for n, s in own.items()}
        if rest is not False:
            out["properties"] |= {name: rest for name in allowed if name not in own}
        out["additionalProperties"] = False
        return
    pattern = _names_pattern(names)
    if pattern is None or own or "patternProperties" in out:
        report.weaken(place, "propertyNames", "other rules about names stand beside it")
    elif rest is not False and report.allows(place, "propertyNames"):
        out["patternProperties"] = {pattern: rest}
        out["additionalProperties"] = False


def _names_pattern(names: dict[str, Any]) -> str | None:
    if "pattern" in names:
        try:
            return translate(names["pattern"]) if len(names) == 1 else None
        except UnsupportedPattern:
            return None
    least, limit = names.get("minLength", 0), names.get("maxLength", MOST)
    if least > MOST:
        return None
    return f"^(?s:.{{{least},{limit if limit < MOST else ''}}})$"


def _write_counts(place: Place, out: dict[str, Any], is_composed: bool, report: Report) -> None:
    """Writes minProperties and maxProperties where names can be counted."""
    rules = place.value
    own = {name for name, schema in out.get("properties", {}).items() if schema is not False}
    required = {*out.get("required", ())}
    is_open = out.get("additionalProperties", True) is not False or "patternProperties" in out
    least, limit = rules.get("minProperties", 0), rules.get("maxProperties", MOST)
    if least <= len(required):
        least = 0
    if limit >= MOST or (not is_open and limit >= len(own | required)):
        limit = None
    if not least and limit is None:
        return
    keyword = "minProperties" if least else "maxProperties"
    optional = own - required
    rest = least - len(required)
    small = rest <= 1 and (limit is None or limit - len(required) == 1)
    counted = not optional or (small and not is_open)
    if is_composed or not counted or not report.allows(place, keyword):
        report.weaken(place, keyword, "names are not counted beside optional properties")
        return
    if least and is_open and rest > 1:
        report.weaken(place, keyword, "a name may come twice")
    if least:
        out["minProperties"] = least
    if limit is not None:
        out["maxProperties"] = limit
