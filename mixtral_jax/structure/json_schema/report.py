"""Report of a reading: what is not enforced, and how a schema is to be written where it stands."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.json_schema.document import Place, point

MOST_ENTRIES = 100


@dataclass(frozen=True)
class Mode:
    """Rules that a schema is written with beyond its own."""

    is_composed: bool = False
    """It is intersected with others, so that closing it would change what they mean."""
    require: tuple[str, ...] = ()
    """Names that an object must have."""
    exclude: tuple[str, ...] = ()
    """Names that an object must not have."""


Write = Callable[[Place, Mode], Any]
"""Function that writes the schema at a place; returns a dict or a bool."""


@dataclass
class Report:
    """Entries for the caller about rules that are not enforced token by token."""

    strict: bool
    omit: frozenset[str] = frozenset()
    """Pointers of keywords that are to be left out, because their grammar was refused."""
    entries: list[str] = field(default_factory=list)
    is_enforced: bool = True
    risky: list[str] = field(default_factory=list)
    """Pointers of keywords whose grammar may be refused."""

    def note(self, place: Place, keyword: str, text: str) -> None:
        """Lists something that JSON Schema itself does not ask of an answer."""
        self._add(f"{point(place.pointer, keyword)}: {text}")

    def weaken(self, place: Place, keyword: str, why: str) -> None:
        """Lists a rule that is not enforced. Raises StructureError if the caller is strict."""
        pointer = point(place.pointer, keyword)
        if self.strict:
            raise StructureError(
                f'"{keyword}" cannot be enforced: {why}; leave it out, or ask without strict',
                pointer,
            )
        self.is_enforced = False
        self._add(f"{pointer}: not enforced: {why}")

    def allows(self, place: Place, keyword: str, is_risky: bool = True) -> bool:
        """Returns False, and lists it, for a keyword whose grammar was refused."""
        pointer = point(place.pointer, keyword)
        if pointer in self.omit:
            self.weaken(place, keyword, "its grammar is too complex, or it contradicts others")
            return False
        if is_risky:
            self.risky.append(pointer)
        return True

    def _add(self, entry: str) -> None:
        if len(self.entries) < MOST_ENTRIES:
            self.entries.append(entry[:500])
        elif len(self.entries) == MOST_ENTRIES:
            self.entries.append("and more")
