"""JSON Schemas as clients send them, rewritten into what can be enforced token by token.

What cannot be enforced is refused with its keyword and JSON pointer, or, where the caller did not
ask for strictness, left out and listed; a finished answer is then checked against the original.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.json_schema.checker import check_answer
from mixtral_jax.structure.json_schema.document import Document
from mixtral_jax.structure.json_schema.finite import prune
from mixtral_jax.structure.json_schema.keywords import vetter
from mixtral_jax.structure.json_schema.report import Report
from mixtral_jax.structure.json_schema.writer import Writer


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
    risky: tuple[str, ...] = ()
    """Pointers of rules whose grammar may be refused as too complex."""


def read(text: str, strict: bool = False, omit: frozenset[str] = frozenset()) -> Schema:
    """Reads a JSON Schema (drafts 4, 6, 7, 2019-09 and 2020-12; without `$schema`, 2020-12).

    Args:
        text: the schema as JSON, at most 256 KB.
        strict: refuses a rule that cannot be enforced; else it is left out and listed.
        omit: pointers of rules to treat as such that cannot be enforced.

    Raises StructureError with the pointer of the part that is wrong.
    """
    report = Report(strict, omit)
    document = Document(text, vetter(report))
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
        tuple(dict.fromkeys(report.risky)),
    )


def read_parameters(text: str, strict: bool = False, omit: frozenset[str] = frozenset()) -> Schema:
    """Reads the schema of a function's parameters, whose instances must be objects.

    An empty text stands for a function without parameters. Raises StructureError as `read` does.
    """
    report = Report(strict, omit)
    document = Document(text or '{"properties": {}}', vetter(report))
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
    attempt: Callable[[Schema], None],
    strict: bool = False,
    reader: Callable[[str, bool, frozenset[str]], Schema] = read,
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
    suspects = list(schema.risky)
    if not suspects or not _passes(reader(text, False, frozenset(suspects)), attempt):
        raise refusal
    guilty: list[str] = []
    while suspects:
        low, high = 0, len(suspects)
        if _passes(reader(text, False, frozenset(guilty)), attempt):
            break
        while high - low > 1:
            middle = (low + high) // 2
            omitted = frozenset([*guilty, *suspects[middle:]])
            if _passes(reader(text, False, omitted), attempt):
                low = middle
            else:
                high = middle
        guilty.append(suspects[low])
        suspects = suspects[low + 1 :]
        if len(guilty) > 8:
            guilty += suspects
            break
    if strict:
        raise StructureError(str(refusal), guilty[0])
    return reader(text, False, frozenset(guilty))


def _passes(schema: Schema, attempt: Callable[[Schema], None]) -> bool:
    try:
        attempt(schema)
    except StructureError:
        return False
    return True


def check(text: str, schema: Schema) -> str | None:
    """Checks a finished answer against the original schema; returns what is wrong, or None.

    It takes up to a second, and what cannot be checked in that time is wrong. Needs the package
    jsonschema. Formats are annotations in it.
    """
    return check_answer(text, schema.original, schema.draft)
