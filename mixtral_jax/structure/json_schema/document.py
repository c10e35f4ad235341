"""The text of a JSON Schema, read with limits that are checked before it is walked."""

import json
import re
from typing import Any, Never

from mixtral_jax.errors import StructureError

MAX_BYTES = 256 * 1024  # of a schema
MAX_STRING = 64 * 1024  # characters of a string in it: a longer one makes a step slow
MAX_NESTING = 100  # brackets within brackets

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)

DRAFTS = {
    "http://json-schema.org/draft-04/schema": "draft4",
    "http://json-schema.org/draft-06/schema": "draft6",
    "http://json-schema.org/draft-07/schema": "draft7",
    "https://json-schema.org/draft/2019-09/schema": "draft2019-09",
    "https://json-schema.org/draft/2020-12/schema": "draft2020-12",
}


def parse(text: str) -> Any:
    """Returns the value of a schema's text. Objects keep the order of their names.

    Raises StructureError if it is no JSON (RFC 8259, and without NaN and Infinity), if it is too
    large, or if an object has a name twice.
    """
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise StructureError(f"the schema is larger than {MAX_BYTES // 1024} KB")
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_NESTING:
            raise StructureError(f"the schema is nested more than {MAX_NESTING} levels deep")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError as error:
        raise StructureError("the schema is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise StructureError(f"the schema is no JSON: {error}") from error
    except StructureError:
        raise
    except ValueError as error:  # a number of more digits than Python reads
        raise StructureError(f"the schema has a number that cannot be read: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise StructureError(f"an object of the schema has the name {twice[:80]!r} twice")
    return value


def _refuse(constant: str) -> Never:
    raise StructureError(f"the schema has {constant}, which is no JSON")


def point(pointer: str, *steps: str | int) -> str:
    """Returns the JSON pointer (RFC 6901) of what lies under `pointer` by the given steps."""
    escaped = (str(step).replace("~", "~0").replace("/", "~1") for step in steps)
    return pointer + "".join(f"/{step}" for step in escaped)
