"""Proofs that no instance is valid under two schemas, so that "exactly one" is "any" of them.

The first of two schemas is taken as it is written (its objects closed, its tag required), the
second as the caller meant it: what is written for a branch must not be valid under another.
"""

from dataclasses import dataclass
from typing import Any

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.json_schema.arrays import items_of
from mixtral_jax.structure.json_schema.document import Document, Place
from mixtral_jax.structure.json_schema.keywords import TYPES, is_rule, kind_of, same, types_of
from mixtral_jax.structure.json_schema.objects import closes
from mixtral_jax.structure.json_schema.report import Mode

_DEPTH = 6  # of properties within properties
_BUDGET = 20_000  # pairs compared in one document


Types = frozenset[str]
EVERY_TYPE: Types = frozenset(TYPES)


@dataclass(frozen=True)
class Side:
    """One of two schemas that are compared."""

    place: Place
    mode: Mode | None = None
    """How it is written; None if it is taken as the caller meant it."""

    def at(self, place: Place) -> "Side":
        """Returns a schema below this one on the same side."""
        mode = None if self.mode is None else Mode(is_composed=self.mode.is_composed)
        return Side(place, mode)


class Prover:
    """Comparisons of the schemas of one document."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._budget = _BUDGET

    def are_disjoint(
        self, first: Side, second: Side, depth: int = _DEPTH, types: Types = EVERY_TYPE
    ) -> bool:
        """Returns True only if no instance of the given types is valid under both."""
        self._budget -= 1
        if self._budget < 0 or depth < 0:
            return False
        if first.place.value is False or second.place.value is False:
            return True
        firsts, seconds = self.conjuncts(first), self.conjuncts(second)
        return any(self._apart(a, b, depth, types) for a in firsts for b in seconds)

    def conjuncts(self, side: Side) -> list[Side]:
        """Returns the schemas that an instance of one must all match; references are followed."""
        rows: list[Side] = []
        waiting, seen = [side], {side.place.pointer}
        while waiting and len(rows) < 30:
            current = waiting.pop(0)
            rules = current.place.value
            if not isinstance(rules, dict):
                if rules is False:
                    rows.append(current)
                continue
            targets = []
            reference = rules.get("$ref")
            if isinstance(reference, str):
                try:
                    targets.append(self._document.resolve(reference, current.place))
                except StructureError:
                    continue
                if self._document.is_old:
                    rules = {"$ref": reference}
            if isinstance(rules.get("allOf"), list):
                targets += [
                    current.place.below("allOf", index) for index in range(len(rules["allOf"]))
                ]
            beside = [k for k in rules if is_rule(k, self._document.draft) and k != "type"]
            alone = len(targets) == 1 and len(beside) == 1
            if rules and not (alone and "type" not in rules):
                rows.append(current)
            for target in targets:
                if target.pointer not in seen:
                    seen.add(target.pointer)
                    mode = current.mode
                    if mode is not None and not alone:
                        mode = Mode(True)
                    waiting.append(Side(target, mode))
        return rows

    def _apart(self, first: Side, second: Side, depth: int, types: Types) -> bool:
        for either, other in ((first, second), (second, first)):
            rules = either.place.value
            for keyword in ("anyOf", "oneOf"):
                branches = rules.get(keyword) if isinstance(rules, dict) else None
                if isinstance(branches, list) and 0 < len(branches) <= 30:
                    sides = [
                        Side(
                            either.place.below(keyword, index),
                            None if either.mode is None else Mode(True),
                        )
                        for index in range(len(branches))
                    ]
                    if all(self.are_disjoint(side, other, depth - 1, types) for side in sides):
                        return True
        a, b = first.place.value, second.place.value
        if a is False or b is False:
            return True
        if not isinstance(a, dict) or not isinstance(b, dict):
            return False
        values = [_values(a), _values(b)]
        if values[0] is not None and values[1] is not None:
            return not any(same(x, y) for x in values[0][:200] for y in values[1][:200]) and (
                max(map(len, (values[0], values[1]))) <= 200
            )
        common = _kinds(first.place) & _kinds(second.place) & types
        return all(self._apart_as(kind, first, second, depth) for kind in common)

    def _apart_as(self, kind: str, first: Side, second: Side, depth: int) -> bool:
        """Returns True if no instance of one type is valid under both."""
        a, b = first.place.value, second.place.value
        if kind == "object":
            return self._objects_apart(first, second, depth)
        if kind == "array":
            return (
                a.get("maxItems", 2**60) < b.get("minItems", 0)
                or b.get("maxItems", 2**60) < a.get("minItems", 0)
                or self._arrays_apart(first, second, depth)
            )
        if kind == "string":
            return a.get("maxLength", 2**60) < b.get("minLength", 0) or b.get(
                "maxLength", 2**60
            ) < a.get("minLength", 0)
        if kind in ("integer", "number"):
            return _is_below(a, b) or _is_below(b, a)
        return False

    def _objects_apart(self, first: Side, second: Side, depth: int) -> bool:
        for key in (*self.required(first), *self.required(second)):
            a, b = self._property(first, key), self._property(second, key)
            if a is False or b is False:
                return True
            if isinstance(a, Side) and isinstance(b, Side) and self.are_disjoint(a, b, depth - 1):
                return True
        return False

    def required(self, side: Side) -> tuple[str, ...]:
        """Returns the names that an object must have by its own rules and its mode."""
        names = side.place.value.get("required", ()) if isinstance(side.place.value, dict) else ()
        own = tuple(name for name in names if isinstance(name, str)) if names else ()
        return (*own, *(side.mode.require if side.mode else ()))

    def _property(self, side: Side, name: str) -> Side | bool | None:
        """Returns the schema of a name, False where it is not allowed, None if nothing is known."""
        rules = side.place.value
        if side.mode and name in side.mode.exclude:
            return False
        if name in rules.get("properties", {}):
            return side.at(side.place.below("properties", name))
        if rules.get("patternProperties"):
            return None
        if side.mode is not None and closes(side.place, side.mode):
            return False
        rest = rules.get("additionalProperties", True)
        if isinstance(rest, bool):
            return False if rest is False else None
        return side.at(side.place.below("additionalProperties"))

    def _arrays_apart(self, first: Side, second: Side, depth: int) -> bool:
        a, b = first.place.value, second.place.value
        lengths = (a.get("minItems", 0), b.get("minItems", 0))
        rows = [items_of(side.place, self._document.draft) for side in (first, second)]
        for index in range(min(max(lengths), 8)):
            items = []
            for side, (head, rest) in zip((first, second), rows, strict=True):
                item = head[index] if index < len(head) else rest
                if item is not None:
                    items.append(side.at(item))
            if len(items) == 2 and self.are_disjoint(items[0], items[1], depth - 1):
                return True
            if any(item.place.value is False for item in items):
                return True
        return False


def _values(rules: dict[str, Any]) -> list[Any] | None:
    if "const" in rules:
        return [rules["const"]]
    values = rules.get("enum")
    return values if isinstance(values, list) else None


def _kinds(place: Place) -> frozenset[str]:
    """Returns the types of instances that a schema's own rules allow; integers are numbers too."""
    values = _values(place.value)
    types = types_of(place)
    kinds = {*TYPES} if types is None else {*types}
    if values is not None:
        kinds &= {kind_of(value) for value in values} | {
            "number" for value in values if kind_of(value) == "integer"
        }
    if "number" in kinds:
        kinds.add("integer")
    return frozenset(kinds)


def _is_below(low: dict[str, Any], high: dict[str, Any]) -> bool:
    """Returns True if every number of one schema is less than those of another."""
    for keyword, strict in (("maximum", False), ("exclusiveMaximum", True)):
        for other, also in (("minimum", False), ("exclusiveMinimum", True)):
            top, bottom = low.get(keyword), high.get(other)
            if isinstance(top, bool) or isinstance(bottom, bool) or top is None or bottom is None:
                continue
            if top < bottom or (top == bottom and (strict or also)):
                return True
    return False
