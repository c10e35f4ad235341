"""JSON Schemas as clients send them, rewritten into what can be enforced token by token.

What cannot be enforced is refused with its keyword and JSON pointer, or, where the caller did not
ask for strictness, left out and listed; a finished answer is then checked against the original.
"""

import json
from dataclasses import dataclass

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.json_schema.document import parse


@dataclass(frozen=True)
class Schema:
    """A JSON Schema in the form that a grammar is made from."""

    text: str
    """JSON for llguidance. What it accepts is valid under the original, but for `weakened`."""
    original: str
    """The text that the caller sent."""
    weakened: tuple[str, ...] = ()
    """Rules that are not enforced token by token, each as "POINTER: what and why"."""
    is_enforced: bool = True
    """False if a finished answer must be checked against the original."""


def read(text: str, strict: bool = False) -> Schema:
    """Reads a JSON Schema (drafts 4, 6, 7, 2019-09 and 2020-12; without `$schema`, 2020-12).

    Args:
        text: the schema as JSON, at most 256 KB.
        strict: refuses a rule that cannot be enforced; else it is left out and listed.

    Raises StructureError with the pointer of the part that is wrong.
    """
    value = parse(text)
    if isinstance(value, dict):
        value.pop("x-guidance", None)
    elif not isinstance(value, bool):
        raise StructureError("a schema is a JSON object, or true or false")
    return Schema(json.dumps(value, ensure_ascii=False), text)


def read_parameters(text: str, strict: bool = False) -> Schema:
    """Reads the schema of a function's parameters, whose instances must be objects.

    An empty text stands for a function without parameters. Raises StructureError as `read` does.
    """
    return read(text or '{"type": "object", "properties": {}}', strict)


def check(text: str, schema: Schema) -> str | None:
    """Checks a finished answer against the original schema; returns what is wrong, or None."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"the answer is no JSON: {error}"
    return None
