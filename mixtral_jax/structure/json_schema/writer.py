"""Writing of a schema as a grammar can enforce it: what it accepts is valid under the original.

Every schema that a reference names is written once for each mode, under `$defs`; annotations,
drafts and addresses are gone from the result.
"""

from typing import Any

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.json_schema.arrays import write_array
from mixtral_jax.structure.json_schema.dependencies import write_dependencies
from mixtral_jax.structure.json_schema.document import Document, Place
from mixtral_jax.structure.json_schema.keywords import (
    IN_PLACE,
    TYPES,
    is_annotation,
    is_rule,
    types_of,
)
from mixtral_jax.structure.json_schema.negations import write_condition, write_not
from mixtral_jax.structure.json_schema.objects import write_object
from mixtral_jax.structure.json_schema.overlap import Prover
from mixtral_jax.structure.json_schema.report import Mode, Report
from mixtral_jax.structure.json_schema.scalars import write_constants, write_numbers, write_text
from mixtral_jax.structure.json_schema.unions import write_any_of, write_one_of

_PASSED_ON = ("$ref", "anyOf", "oneOf", "allOf")  # whose branches stand for the schema itself
_APART = {"$ref", "anyOf", "allOf", "type"}  # rules that no other rule changes
MOST_SCHEMAS = 20_000  # written for one document


class Writer:
    """Writer of one document."""

    def __init__(self, document: Document, report: Report) -> None:
        self.sources: dict[str, str] = {}
        """Pointer in the document of each name under `$defs`."""
        self._document = document
        self._report = report
        self._prover = Prover(document)
        self._names: dict[tuple[str, Mode], str] = {}
        self._waiting: list[tuple[str, Place, Mode]] = []
        self._count = 0

    def write(self) -> Any:
        """Returns the schema: a dict, or a bool. Raises StructureError with a pointer."""
        root = self.schema(self._document.root, Mode())
        definitions: dict[str, Any] = {}
        while self._waiting:
            name, place, mode = self._waiting.pop()
            definitions[name] = self.schema(place, mode)
        if isinstance(root, dict) and definitions:
            root = {**root, "$defs": definitions}
        return root

    def schema(self, place: Place, mode: Mode) -> Any:
        """Returns what is written for the schema at a place."""
        self._count += 1
        if self._count > MOST_SCHEMAS:
            raise StructureError(
                f"the schema has more than {MOST_SCHEMAS} parts, those of references counted once "
                "for each use; write it smaller",
                place.pointer,
            )
        if isinstance(place.value, bool):
            return place.value
        place = self._rules(place)
        rules = place.value
        types = types_of(place)
        allowed = frozenset(TYPES if types is None else types)
        beside = [keyword for keyword in rules if keyword in IN_PLACE]
        ignored = {*IN_PLACE, "type", "discriminator"}
        others = [keyword for keyword in rules if keyword not in ignored]
        inner = Mode(is_composed=True)
        is_alone = not others and len(beside) == 1 and beside[0] in _PASSED_ON
        if is_alone and len(rules.get("allOf", "1")) == 1:
            inner, mode = mode, Mode(is_composed=mode.is_composed)
        own = self._own(place, allowed, mode)
        if own is None:
            return False
        first = {"type": list(types) if len(types) != 1 else types[0]} if types is not None else {}
        return self._join(place, first, own, inner, allowed)

    def _rules(self, place: Place) -> Place:
        """Returns a schema without what says nothing about an instance; lists unknown keywords."""
        value, draft = place.value, self._document.draft
        kept = {}
        if "oneOf" in value and "discriminator" in value:
            kept["discriminator"] = value["discriminator"]
        old_reference = self._document.is_old and "$ref" in value
        for keyword, rule in value.items():
            if not is_rule(keyword, draft):
                if not is_annotation(keyword):
                    self._report.note(place, keyword, "not a keyword of the draft: an annotation")
            elif old_reference and keyword != "$ref":
                self._report.note(place, keyword, f"{draft} reads nothing beside $ref")
            elif keyword not in ("then", "else", "minContains", "maxContains") or (
                "if" in value or "contains" in value
            ):
                kept[keyword] = rule
        return Place(kept, place.pointer, place.base, draft)

    def _own(self, place: Place, types: frozenset[str], mode: Mode) -> dict[str, Any] | None:
        """Returns the rules that are not about the same instance as a whole; None allows none."""
        constants = write_constants(place, types, self._report)
        if constants is None:
            return None
        return {
            **constants,
            **write_numbers(place, types, self._report),
            **write_text(place, types, self._report),
            **write_array(place, types, mode, self._document.draft, self._report, self.schema),
            **write_object(place, types, mode, self._report, self.schema),
        }

    def _join(
        self,
        place: Place,
        first: dict[str, Any],
        own: dict[str, Any],
        inner: Mode,
        types: frozenset[str],
    ) -> Any:
        """Joins the rules of a schema in the order in which its keywords stand."""
        out = dict(first)
        rules = place.value
        is_placed = False
        for keyword in rules:
            if keyword not in IN_PLACE:
                if not is_placed and (keyword == "properties" or "properties" not in rules):
                    out.update(own)
                    is_placed = True
                continue
            for conjunct in self._in_place(place, keyword, inner, types):
                if conjunct is False:
                    return False
                if conjunct is not True:
                    _add(out, conjunct)
        if not is_placed:
            out.update(own)
        return out or True

    def _in_place(
        self, place: Place, keyword: str, inner: Mode, types: frozenset[str]
    ) -> list[Any]:
        """Returns the schemas that a keyword adds to the one it stands in."""
        if keyword == "$ref":
            return [self._reference(self._document.resolve(place.value["$ref"], place), inner)]
        if keyword in ("$dynamicRef", "$recursiveRef"):
            target = self._document.dynamic(place.value[keyword], place)
            if target is None:
                self._report.weaken(place, keyword, "it depends on who refers to it")
                return []
            return [self._reference(target, inner)]
        if keyword == "allOf":
            count = len(place.value["allOf"])
            return [self.schema(place.below("allOf", index), inner) for index in range(count)]
        if keyword == "anyOf":
            return [write_any_of(place, inner, self.schema)]
        if keyword == "oneOf":
            return [write_one_of(place, types, inner, self._prover, self._report, self.schema)]
        if keyword == "not":
            return [write_not(place, types, self._report)]
        if keyword == "if":
            return [write_condition(place, self._report, self.schema)]
        return write_dependencies(place, keyword, types, self._report, self.schema)

    def _reference(self, target: Place, mode: Mode) -> Any:
        if isinstance(target.value, bool):
            return target.value
        if not isinstance(target.value, dict):
            raise StructureError("a reference names something that is no schema", target.pointer)
        key = (target.pointer, mode)
        if key not in self._names:
            self._names[key] = str(len(self._names))
            self.sources[self._names[key]] = target.pointer
            self._waiting.append((self._names[key], target, mode))
        return {"$ref": f"#/$defs/{self._names[key]}"}


def _add(out: dict[str, Any], conjunct: dict[str, Any]) -> None:
    """Adds a schema to another that is to hold as well; rules that read each other stay apart."""
    if conjunct.keys().isdisjoint(out) and conjunct.keys() <= _APART:
        out.update(conjunct)
    else:
        out.setdefault("allOf", []).append(conjunct)
