"""Rules for arrays, written in the form of draft 2020-12."""

from typing import Any

from mixtral_jax.structure.json_schema.document import Place
from mixtral_jax.structure.json_schema.report import Mode, Report, Write
from mixtral_jax.structure.json_schema.scalars import MOST, write_range


def items_of(place: Place, draft: str) -> tuple[list[Place], Place | None]:
    """Returns the schemas of the first items, and that of those after them."""
    rules = place.value
    if isinstance(rules.get("items"), list):  # drafts before 2020-12
        first = [place.below("items", index) for index in range(len(rules["items"]))]
        return first, place.below("additionalItems") if "additionalItems" in rules else None
    first = []
    if draft == "draft2020-12":
        count = len(rules.get("prefixItems", ()))
        first = [place.below("prefixItems", index) for index in range(count)]
    return first, place.below("items") if "items" in rules else None


def write_array(
    place: Place, types: frozenset[str], mode: Mode, draft: str, report: Report, write: Write
) -> dict[str, Any]:
    """Returns the rules for arrays."""
    rules = place.value
    if "array" not in types:
        return {}
    out: dict[str, Any] = {**write_range(place, "minItems", "maxItems", report)}
    inner = Mode(is_composed=mode.is_composed)
    first, rest = items_of(place, draft)
    if first:
        out["prefixItems"] = [write(item, inner) for item in first]
    if rest is not None:
        out["items"] = write(rest, inner)
    if rules.get("uniqueItems") and rules.get("maxItems", 2) > 1:
        report.weaken(place, "uniqueItems", "items are not compared")
    _write_contains(place, out, report)
    beyond = rules.get("unevaluatedItems", True)
    if beyond not in (True, {}) and rest is None:
        if {"$ref", "allOf", "anyOf", "oneOf", "not", "if", "contains"} & rules.keys():
            report.weaken(place, "unevaluatedItems", "other schemas stand beside it")
        else:
            out["items"] = write(place.below("unevaluatedItems"), inner)
    return out


def _write_contains(place: Place, out: dict[str, Any], report: Report) -> None:
    rules = place.value
    if "contains" not in rules or (rules.get("minContains", 1) == 0 and "maxContains" not in rules):
        return
    if rules["contains"] in (True, {}):  # every item counts
        least = max(out.get("minItems", 0), rules.get("minContains", 1))
        limits = [m for m in (out.get("maxItems"), rules.get("maxContains")) if m is not None]
        if least > MOST:
            report.weaken(place, "minContains", f"no answer is longer than {MOST}")
        else:
            out["minItems"] = least
        if limits and min(limits) < MOST:
            out["maxItems"] = min(limits)
        return
    report.weaken(place, "contains", "items are not counted")
