"""Checks of finished answers against the schema that the caller sent, with jsonschema.

Needs the package jsonschema (the extra `serve`). The time is bounded: every keyword looks at the
clock, texts are matched by `regex`, which takes a limit, and items are compared by what they are
written as. Numbers are taken as they are written, so that 0.07 is a multiple of 0.01.
"""

import json
import time
from collections.abc import Callable, Iterator
from decimal import Decimal, DecimalException
from functools import partial
from typing import Any

SECONDS = 1.0
_MOST_DEPTH = 200  # of an answer's brackets


class _Late(Exception):
    """The time is over."""


def check_answer(answer: str, schema: str, draft: str, seconds: float = SECONDS) -> str | None:
    """Returns why an answer is not valid under a schema, or None if it is.

    An answer that cannot be checked within the time is reported as such. It computes for up to
    `seconds` and so belongs on a thread of its own.

    Args:
        answer: JSON.
        schema: JSON, in a form that is known to be right.
        draft: the draft's name, as `Document.draft` has it.
    """
    # Imported when they are needed: the library enforces schemas without them.
    from jsonschema import exceptions, validators
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        instance = _read(answer)
    except (ValueError, RecursionError) as error:
        return f"the answer is no JSON: {error}"
    if _is_deep(instance):
        return f"the answer is nested more than {_MOST_DEPTH} levels deep"
    base = {
        "draft4": validators.Draft4Validator,
        "draft6": validators.Draft6Validator,
        "draft7": validators.Draft7Validator,
        "draft2019-09": validators.Draft201909Validator,
        "draft2020-12": validators.Draft202012Validator,
    }[draft]
    deadline = time.monotonic() + seconds
    rules = {
        **base.VALIDATORS,
        "pattern": partial(_pattern, deadline),
        "patternProperties": partial(_pattern_properties, deadline),
        "additionalProperties": partial(_additional, deadline),
        "uniqueItems": _unique_items,
    }
    keywords = {name: partial(_timed, rule, deadline) for name, rule in rules.items()}
    checker = base.TYPE_CHECKER.redefine("integer", _is_integer)
    validator = validators.extend(base, keywords, type_checker=checker)
    # An empty registry fetches nothing.
    registry: Any = Registry()
    try:
        fault = next(validator(_read(schema), registry=registry).iter_errors(instance), None)
    except (_Late, TimeoutError):
        return "the answer could not be checked in time"
    except (RecursionError, DecimalException, Unresolvable, exceptions.UndefinedTypeCheck) as cause:
        return f"the answer could not be checked: {cause}"[:500]
    if fault is None:
        return None
    pointer = "".join(f"/{step}" for step in fault.absolute_path)
    return f"{pointer or 'the answer'}: {fault.message}"[:500]


def _read(text: str) -> Any:
    return json.loads(text, parse_float=Decimal, parse_constant=_refuse)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _is_deep(value: Any) -> bool:
    waiting = [(value, 0)]
    while waiting:
        inner, depth = waiting.pop()
        if depth > _MOST_DEPTH:
            return True
        if isinstance(inner, dict):
            waiting += [(child, depth + 1) for child in inner.values()]
        elif isinstance(inner, list):
            waiting += [(child, depth + 1) for child in inner]
    return False


def _is_integer(_checker: Any, value: Any) -> bool:
    if isinstance(value, Decimal):
        return value == value.to_integral_value()
    return isinstance(value, int) and not isinstance(value, bool)


Rule = Callable[[Any, Any, Any, Any], Iterator[Any] | None]


def _timed(
    rule: Rule, deadline: float, validator: Any, value: Any, instance: Any, schema: Any
) -> Iterator[Any]:
    if time.monotonic() > deadline:
        raise _Late
    yield from rule(validator, value, instance, schema) or ()


def _search(pattern: str, text: str, deadline: float) -> bool:
    import regex

    try:
        compiled = regex.compile(pattern, flags=regex.V0)
    except regex.error as error:
        raise DecimalException(f"the pattern {pattern[:80]!r} is not understood") from error
    rest = deadline - time.monotonic()
    if rest <= 0:
        raise _Late
    return compiled.search(text, timeout=rest) is not None


def _pattern(
    deadline: float, validator: Any, value: Any, instance: Any, _schema: Any
) -> Iterator[Any]:
    from jsonschema import ValidationError

    if validator.is_type(instance, "string") and not _search(value, instance, deadline):
        yield ValidationError(f"{instance[:80]!r} does not match {value[:80]!r}")


def _pattern_properties(
    deadline: float, validator: Any, value: Any, instance: Any, _schema: Any
) -> Iterator[Any]:
    if validator.is_type(instance, "object"):
        for pattern, schema in value.items():
            for name, inner in instance.items():
                if _search(pattern, name, deadline):
                    yield from validator.descend(inner, schema, path=name, schema_path=pattern)


def _additional(
    deadline: float, validator: Any, value: Any, instance: Any, schema: Any
) -> Iterator[Any]:
    from jsonschema import ValidationError

    if not validator.is_type(instance, "object"):
        return
    patterns = schema.get("patternProperties", {})
    for name, inner in instance.items():
        known = name in schema.get("properties", {})
        if known or any(_search(pattern, name, deadline) for pattern in patterns):
            continue
        if value is False:
            yield ValidationError(f"the name {name[:80]!r} is not allowed")
        else:
            yield from validator.descend(inner, value, path=name)


def _unique_items(validator: Any, value: Any, instance: Any, _schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if value and validator.is_type(instance, "array"):
        rows = {_written(item) for item in instance}
        if len(rows) < len(instance):
            yield ValidationError("two items are equal")


def _written(value: Any) -> str:
    """Writes a value so that two are written the same exactly if they are equal as JSON."""
    if isinstance(value, dict):
        rows = sorted((json.dumps(name), _written(inner)) for name, inner in value.items())
        return "{" + ",".join(f"{name}:{inner}" for name, inner in rows) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        sign, digits, exponent = Decimal(value).as_tuple()
        text = "".join(map(str, digits)).lstrip("0")
        short = text.rstrip("0")
        return f"{'-' * sign}{short}e{int(exponent) + len(text) - len(short)}" if short else "0"
    return json.dumps(value)
