"""The text of a JSON Schema, read with limits that are checked before it is walked."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Never
from urllib.parse import unquote, urljoin

from mixtral_jax.errors import StructureError

MAX_BYTES = 256 * 1024  # of a schema
MAX_STRING = 64 * 1024  # characters of a string in it: a longer one makes a step slow
MAX_NESTING = 100  # brackets within brackets
_MAX_DIGITS = 308  # of an integer

# Keywords that hold schemas: by name, in a list, or directly.
IN_OBJECTS = frozenset(
    {
        *("$defs", "definitions", "properties", "patternProperties"),
        *("dependentSchemas", "dependencies"),
    }
)
IN_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
DIRECTLY = frozenset(
    {
        *("items", "additionalItems", "contains", "unevaluatedItems"),
        *("additionalProperties", "propertyNames", "unevaluatedProperties"),
        *("not", "if", "then", "else"),
    }
)
_OLD_DRAFTS = ("draft4", "draft6", "draft7")

STRING = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)', re.DOTALL)
"""A string as JSON writes it, or one that never ends: else each of its quotes would be tried to the
end of the text."""

_OLD_ADDRESS = "http://json-schema.org/draft-0"
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
    for bracket in re.findall(r"[\[\]{}]", STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_NESTING:
            raise StructureError(f"the schema is nested more than {MAX_NESTING} levels deep")
    if max((len(match) for match in STRING.findall(text)), default=0) > MAX_STRING + 2:
        raise StructureError(f"a string of the schema is longer than {MAX_STRING} characters")
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=_float,
            parse_int=_integer,
        )
    except RecursionError as error:
        raise StructureError("the schema is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise StructureError(f"the schema is no JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise StructureError(f"an object of the schema has the name {twice[:80]!r} twice")
    return value


def _float(text: str) -> float | int:
    """Reads a number with a point or an exponent: 1.0 is the integer 1, and 1e400 is refused."""
    value = float(text)
    if math.isinf(value):
        raise StructureError(f"the schema has the number {text[:40]}, which is too large")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _integer(text: str) -> int:
    """Reads an integer; one beyond the largest double, 1.8e308, is refused unread, as 1e400 is."""
    if len(text) > _MAX_DIGITS:
        raise StructureError(
            f"the schema has a number of {len(text)} digits, which is too large: give at most "
            f"{_MAX_DIGITS}"
        )
    return int(text)


def _refuse(constant: str) -> Never:
    raise StructureError(f"the schema has {constant}, which is no JSON")


def point(pointer: str, *steps: str | int) -> str:
    """Returns the JSON pointer (RFC 6901) of what lies under `pointer` by the given steps."""
    escaped = (str(step).replace("~", "~0").replace("/", "~1") for step in steps)
    return pointer + "".join(f"/{step}" for step in escaped)


@dataclass(frozen=True)
class Place:
    """A schema within a document."""

    value: Any
    pointer: str
    base: str
    """URI that references in it are resolved against; empty for the document itself."""
    draft: str

    def below(self, *steps: str | int) -> "Place":
        """Returns the schema that lies under this one by the given steps."""
        value = self.value
        for step in steps:
            value = value[step]
        base = _join(self.base, _address(value, self.draft))
        return Place(value, point(self.pointer, *steps), base, self.draft)


def _address(value: Any, draft: str) -> str:
    """Returns the address that a schema gives itself; beside `$ref` old drafts read none."""
    if not isinstance(value, dict) or (draft in _OLD_DRAFTS and "$ref" in value):
        return ""
    address = value.get("id" if draft == "draft4" else "$id")
    return address if isinstance(address, str) else ""


def _join(base: str, reference: str) -> str:
    """Resolves a reference; a fragment alone is also joined to a URN, unlike by `urljoin`."""
    if reference.startswith("#"):
        return base.partition("#")[0] + reference
    return urljoin(base, reference)


Vet = Callable[[Place, str], None]
"""Function that checks the forms of a schema's keywords in a draft."""


class Document:
    """A schema's text with its draft, its parts by address, and its references.

    Args:
        text: the schema.
        vet: called for each schema before it is used; it may take keywords out of the value.

    Raises StructureError for a text that `parse` refuses, and for a draft that is not known.
    """

    def __init__(self, text: str, vet: Vet) -> None:
        value = parse(text)
        if not isinstance(value, dict | bool):
            raise StructureError("a schema is a JSON object, or true or false")
        self.draft = _draft(value)
        base = _address(value, self.draft)
        self.root = Place(value, "", base, self.draft)
        self._addressed = {"": self.root, base.rstrip("#"): self.root}
        self._anchors: dict[str, Place] = {}
        self._dynamic: dict[str, int] = {}
        self._vet = vet
        self._vetted: set[str] = set()
        self._prepare(self.root)
        if re.search(r'"(\$id|id|\$anchor|\$dynamicAnchor|\$recursiveAnchor)"', text):
            self._index(self.root)

    @property
    def is_old(self) -> bool:
        """True for the drafts in which what stands beside `$ref` has no meaning."""
        return self.draft in _OLD_DRAFTS

    def resolve(self, reference: str, place: Place) -> Place:
        """Returns the schema that a reference in `place` names.

        Raises StructureError if it lies outside the document, or nowhere.
        """
        address, _, fragment = _join(place.base, reference).partition("#")
        start = self._addressed.get(address)
        if start is None:
            raise StructureError(
                f"the reference {reference[:200]!r} leads out of the schema, and nothing is "
                "fetched; put what it names under $defs",
                point(place.pointer, "$ref"),
            )
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            anchored = self._anchors.get(f"{address}#{fragment}")
            if anchored is None:
                raise self._lost(reference, place)
            return anchored
        for step in fragment.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            inner = start.value
            if isinstance(inner, dict) and step in inner:
                start = start.below(step)
            elif isinstance(inner, list) and step.isdecimal() and int(step) < len(inner):
                start = start.below(int(step))
            else:
                raise self._lost(reference, place)
        self._prepare(start)
        return start

    def _prepare(self, root: Place) -> None:
        """Vets a schema and those in it, each once."""
        waiting = [root]
        while waiting:
            place = waiting.pop()
            if isinstance(place.value, dict) and place.pointer not in self._vetted:
                self._vetted.add(place.pointer)
                self._vet(place, self.draft)
                waiting += children(place)

    def dynamic(self, reference: str, place: Place) -> Place | None:
        """Returns the schema of a `$dynamicRef`, or None where that depends on who refers to it."""
        name = reference.partition("#")[2]
        if self._dynamic.get(name, 0) > 1:
            return None
        return self.resolve(reference, place)

    @staticmethod
    def _lost(reference: str, place: Place) -> StructureError:
        return StructureError(
            f"the reference {reference[:200]!r} names nothing in the schema",
            point(place.pointer, "$ref"),
        )

    def _index(self, root: Place) -> None:
        """Finds the schemas that have an address or an anchor of their own."""
        waiting = [root]
        while waiting:
            place = waiting.pop()
            value = place.value
            if not isinstance(value, dict):
                continue
            name = _address(value, self.draft)
            address = place.base.partition("#")[0]
            if name and place.pointer:
                if name.startswith("#"):
                    self._anchors[f"{address}{name}"] = place
                else:
                    self._addressed[address] = place
            for keyword in ("$anchor", "$dynamicAnchor"):
                if isinstance(value.get(keyword), str):
                    self._anchors[f"{address}#{value[keyword]}"] = place
            for keyword in ("$dynamicAnchor", "$recursiveAnchor"):
                anchor = "" if keyword == "$recursiveAnchor" else value.get(keyword)
                if keyword in value and isinstance(anchor, str):
                    self._dynamic[anchor] = self._dynamic.get(anchor, 0) + 1
            waiting += children(place)


def children(place: Place) -> list[Place]:
    """Returns the schemas that stand directly in a schema, references not followed."""
    rows = []
    for keyword, value in place.value.items():
        if keyword in IN_OBJECTS and isinstance(value, dict):
            rows += [place.below(keyword, name) for name in value]
        elif keyword in IN_LISTS and isinstance(value, list):
            rows += [place.below(keyword, index) for index in range(len(value))]
        elif keyword in DIRECTLY and isinstance(value, dict):
            rows.append(place.below(keyword))
    return rows


def _draft(value: Any) -> str:
    """Returns the draft that a schema is written in, by its address or by its forms."""
    address = value.get("$schema") if isinstance(value, dict) else None
    if address is None:
        return "draft2020-12"
    known = str(address).rstrip("#").replace("https://json-schema.org/draft-0", _OLD_ADDRESS)
    draft = DRAFTS.get(known)
    if draft is None:
        raise StructureError(
            f"the draft {str(address)[:100]!r} is not known; known are {', '.join(DRAFTS)}",
            "/$schema",
        )
    return draft
