"""Rules for numbers, texts and constants, written so that the grammar means the same.

The grammar computes with numbers of 64 bits, so that a bound that is none of them is moved inwards,
and a constant that is none of them is not enforced.
"""

import math
from typing import Any

from mixtral_jax.structure.json_schema.document import Place
from mixtral_jax.structure.json_schema.keywords import NUMBERS, kind_of
from mixtral_jax.structure.json_schema.patterns import UnsupportedPattern, translate
from mixtral_jax.structure.json_schema.report import Report

FORMATS = frozenset(
    {
        *("date", "time", "date-time", "duration", "email", "hostname"),
        *("ipv4", "ipv6", "uuid", "uri"),
    }
)
MOST = 1_000_000
"""Length that no answer reaches: a larger maximum says nothing."""
_EXACT = 2**53
_LARGEST = 9223372036854774784  # the largest double below 2**63


def write_numbers(place: Place, types: frozenset[str], report: Report) -> dict[str, Any]:
    """Returns the rules for numbers."""
    rules = place.value
    if not types & {"integer", "number"}:
        return {}
    out: dict[str, Any] = {}
    for keyword in NUMBERS:
        if keyword not in rules:
            continue
        value = rules[keyword]
        if isinstance(value, bool):  # draft 4: the bound beside it is not part of the range
            if value and keyword.replace("exclusiveM", "m") in rules:
                out[keyword] = out.pop(keyword.replace("exclusiveM", "m"))
            continue
        if keyword == "multipleOf":
            if not report.allows(place, keyword):
                continue
            if value > _EXACT or not value >= 1e-9:
                report.weaken(place, keyword, "the number is too large or too small")
                continue
            out[keyword] = value
            continue
        written = _bound(value, is_upper="max" in keyword.lower())
        if written is None:
            report.weaken(place, keyword, "the number is beyond 64 bits")
        else:
            out[keyword] = written
    return out


def _bound(value: int | float, is_upper: bool) -> int | float | None:
    """Moves a bound inwards to the next double of an integer of 64 bits; None if there is none."""
    if abs(value) > _LARGEST:
        outwards = (value > 0) == is_upper
        return (_LARGEST if value > 0 else -_LARGEST) if outwards else None
    near = float(value)
    if near > value and is_upper:
        near = math.nextafter(near, -math.inf)
    elif near < value and not is_upper:
        near = math.nextafter(near, math.inf)
    return value if near == value else int(near)


def write_text(place: Place, types: frozenset[str], report: Report) -> dict[str, Any]:
    """Returns the rules for strings."""
    rules = place.value
    if "string" not in types:
        return {}
    out = write_range(place, "minLength", "maxLength", report)
    pattern, name = rules.get("pattern"), rules.get("format")
    if pattern is not None and report.allows(place, "pattern"):
        try:
            out["pattern"] = translate(pattern)
        except UnsupportedPattern as error:
            report.weaken(place, "pattern", f"it has {error}")
    if name in FORMATS:
        if report.allows(place, "format", is_risky="pattern" in out or bool(len(out))):
            out["format"] = name
    elif name is not None:
        report.note(place, "format", f'format "{name[:60]}" is an annotation')
    return out


def write_range(place: Place, least: str, limit: str, report: Report) -> dict[str, Any]:
    """Returns the least and the most of a count, without those that no answer meets or breaks."""
    rules = place.value
    out: dict[str, Any] = {}
    if rules.get(least, 0) > MOST:
        report.weaken(place, least, f"no answer is longer than {MOST}")
    elif rules.get(least, 0) > 0:
        out[least] = rules[least]
    if limit in rules and rules[limit] <= MOST:
        out[limit] = rules[limit]
    return out


def write_constants(place: Place, types: frozenset[str], report: Report) -> dict[str, Any] | None:
    """Returns the values that are allowed; None if there are none."""
    rules = place.value
    out: dict[str, Any] = {}
    for keyword in ("const", "enum"):
        if keyword not in rules:
            continue
        values = rules[keyword] if keyword == "enum" else [rules[keyword]]
        values = [value for value in values if _fits(value, types)]
        if not all(map(_is_exact, values)):
            report.weaken(place, keyword, "it has a number that is not exact in 64 bits")
            out["type"] = sorted({kind_of(value) for value in values} or types)
        elif not values:
            return None
        elif keyword == "enum":
            out["enum"] = values
        else:
            out["const"] = values[0]
    return out


def _fits(value: Any, types: frozenset[str]) -> bool:
    kind = kind_of(value)
    return kind in types or (kind == "integer" and "number" in types)


def _is_exact(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_exact, value.values()))
    if isinstance(value, list):
        return all(map(_is_exact, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return abs(value) <= _EXACT and (value == 0 or abs(value) >= 1e-9)
