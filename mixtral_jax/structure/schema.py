"""JSON Schemas as clients send them, rewritten into what can be enforced token by token.

What cannot be enforced is refused with its keyword and JSON pointer, or, where the caller did not
ask for strictness, left out and listed; a finished answer is then checked against the original.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.json_schema.checker import check_answer
from mixtral_jax.structure.json_schema.document import Document, point
from mixtral_jax.structure.json_schema.finite import prune
from mixtral_jax.structure.json_schema.keywords import vet
from mixtral_jax.structure.json_schema.report import Report
from mixtral_jax.structure.json_schema.writer import Writer
from mixtral_jax.structure.specification import Check


@dataclass(frozen=True)
class Schema:
    """A JSON Schema in the form that a grammar is made from."""

    text: str
    """JSON for llguidance. What it accepts is valid under the original, but for `weakened`."""
    original: str
    """The caller's schema, without the keywords whose form is wrong."""
    weakened: tuple[str, ...] = ()
    """Rules that are not enforced token by token, each as "POINTER: what and why"; formats that are
    annotations and keywords that say nothing are among them."""
    is_enforced: bool = True
    """False if a finished answer must be checked against the original."""
    draft: str = "draft2020-12"
    """Draft that the original is read in."""
    places: tuple[str, ...] = ()
    """Pointers, in the original, of the schemas under `$defs` of the text: that of "0" first."""
    risky: tuple[str, ...] = ()
    """Pointers of rules whose grammar may be refused as too complex."""


Attempt = Callable[[Schema], None]
"""Function that compiles a schema; raises StructureError if its grammar is refused."""
Reader = Callable[[str, bool, frozenset[str]], Schema]
_MOST_GUILTY = 8  # rules that are looked for one by one
_MOST_TRIES = 50  # parts that are compiled to find the one that is refused
# Keywords that a refusal may name.
_SHOWN = ("minProperties", "maxProperties", "required", "minItems", "minLength", "minimum")


def read(text: str, strict: bool = False, omit: frozenset[str] = frozenset()) -> Schema:
    """Reads a JSON Schema (drafts 4, 6, 7, 2019-09 and 2020-12; without `$schema`, 2020-12).

    Args:
        text: the schema as JSON, at most 256 KB.
        strict: refuses a rule that cannot be enforced; else it is left out and listed.
        omit: pointers of rules to treat as such that cannot be enforced.

    Raises StructureError with the pointer of the part that is wrong.
    """
    report = Report(strict, omit)
    document = Document(text, partial(vet, report))
    return _written(document, report)


def _written(document: Document, report: Report) -> Schema:
    writer = Writer(document, report)
    written = prune(writer.write(), writer.sources)
    return Schema(
        json.dumps(written, ensure_ascii=False),
        json.dumps(document.root.value, ensure_ascii=False),
        tuple(report.entries),
        report.is_enforced,
        document.draft,
        tuple(writer.sources.values()),
        tuple(dict.fromkeys(report.risky)),
    )


def read_parameters(text: str, strict: bool = False, omit: frozenset[str] = frozenset()) -> Schema:
    """Reads the schema of a function's parameters, whose instances must be objects.

    An empty text stands for a function without parameters. Raises StructureError as `read` does.
    """
    report = Report(strict, omit)
    document = Document(text or '{"properties": {}}', partial(vet, report))
    value: Any = document.root.value
    if not isinstance(value, dict):
        raise StructureError("the parameters of a function are described by a schema of an object")
    types = value.get("type", "object")
    if types != "object" and (not isinstance(types, list) or "object" not in types):
        raise StructureError('the parameters of a function have the type "object"', "/type")
    value["type"] = "object"
    value.setdefault("properties", {})
    return _written(document, report)


def settle(
    text: str,
    attempt: Attempt,
    strict: bool = False,
    reader: Reader = read,
) -> Schema:
    """Reads a schema and leaves out the rules whose grammar is refused, in as few tries as it can.

    Args:
        text: the schema.
        attempt: compiles what was read; raises StructureError if it is refused.
        strict: refuses the schema with the pointer of the rule instead.
        reader: `read` or `read_parameters`.

    Raises StructureError.
    """
    schema = reader(text, strict, frozenset())
    try:
        attempt(schema)
        return schema
    except StructureError as error:
        refusal = error
    guilty = _guilty(text, schema.risky, attempt, reader)
    if guilty is None:
        raise _located(schema, attempt, str(refusal))
    if strict:
        raise StructureError(str(refusal), guilty[0])
    return reader(text, False, frozenset(guilty))


def _guilty(
    text: str, risky: tuple[str, ...], attempt: Attempt, reader: Reader
) -> list[str] | None:
    """Returns the pointers of rules without which a schema is compiled; None if it never is."""
    if not risky or not _passes(reader(text, False, frozenset(risky)), attempt):
        return None
    suspects = list(risky)
    guilty: list[str] = []
    while not _passes(reader(text, False, frozenset(guilty)), attempt):
        low, high = 0, len(suspects)  # with the first `low` of them it is compiled
        while high - low > 1:
            middle = (low + high) // 2
            if _passes(reader(text, False, frozenset([*guilty, *suspects[middle:]])), attempt):
                low = middle
            else:
                high = middle
        guilty.append(suspects[low])
        suspects = suspects[low + 1 :]
        if len(guilty) >= _MOST_GUILTY:
            return guilty + suspects
    return guilty


def _located(schema: Schema, attempt: Attempt, refusal: str) -> StructureError:
    """Returns the refusal of the innermost schema that is refused on its own, with its pointer."""
    value = json.loads(schema.text)
    definitions = value.get("$defs", {})
    pointer = ""
    tries = _MOST_TRIES
    seen: set[str] = set()
    while isinstance(value, dict):
        children = [((keyword, name), child) for keyword, name, child in _parts(value)]
        name = value.get("$ref", "").rpartition("/")[2]
        if name and name not in seen and len(value.keys() - {"$defs"}) == 1:
            seen.add(name)
            pointer, value = schema.places[int(name)], definitions[name]
            continue
        value = None
        for steps, child in children[:tries]:
            tries -= 1
            inner = json.dumps({**child, "$defs": definitions})
            inner_refusal = _refusal(Schema(inner, schema.original), attempt)
            if inner_refusal is not None:
                pointer, value, refusal = point(pointer, *steps), child, inner_refusal
                break
    for keyword in _SHOWN:
        if keyword in refusal:
            return StructureError(refusal, point(pointer, keyword))
    return StructureError(refusal, pointer)


def _parts(value: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    rows = [("properties", name, child) for name, child in value.get("properties", {}).items()]
    for keyword in ("prefixItems", "allOf", "anyOf"):
        rows += [(keyword, str(i), child) for i, child in enumerate(value.get(keyword, ()))]
    return [row for row in rows if isinstance(row[2], dict)]


def _passes(schema: Schema, attempt: Attempt) -> bool:
    return _refusal(schema, attempt) is None


def _refusal(schema: Schema, attempt: Attempt) -> str | None:
    try:
        attempt(schema)
    except StructureError as error:
        return str(error)
    return None


def checks_of(schema: Schema, tool: str = "") -> tuple[Check, ...]:
    """Returns the check of finished answers, or none where the schema is enforced as a whole.

    Args:
        schema: what was read.
        tool: name of the function whose arguments it describes; empty for a text.
    """
    return () if schema.is_enforced else (Check(schema.original, schema.draft, tool),)


def check(text: str, schema: Schema) -> str | None:
    """Checks a finished answer against the original schema; returns what is wrong, or None.

    It takes up to a second, and what cannot be checked in that time is wrong. Needs the package
    jsonschema. Formats are annotations in it.
    """
    return check_answer(text, schema.original, schema.draft)
