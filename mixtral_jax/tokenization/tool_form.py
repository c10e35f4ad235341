"""ToolForm: how a model writes calls of tools, as a sequence of texts, control ids and slots.

Grammars of calls are made from it and answers are read by it, so that what is enforced and what is
understood are the same.
"""

from dataclasses import dataclass
from enum import Enum


class Slot(Enum):
    """Content of a call beside fixed text."""

    NAME = "name"  # of the tool: [a-zA-Z0-9_.-]{1,64}
    ARGUMENTS = "arguments"  # a JSON object
    ID = "id"  # nine letters and digits


Piece = str | int | Slot  # fixed text, the id of a control token, or a slot


@dataclass(frozen=True)
class ToolForm:
    """Form in which a model writes one or more calls: begin, call, separator, call, ..., end.

    Texts are as the tokens spell them: where sentencepiece puts a space before a text that stands
    behind a control token, the text has that space.
    """

    call: tuple[Piece, ...]
    """One call. It has the slots NAME and ARGUMENTS, once each, and ID or not."""
    begin: tuple[str | int, ...] = ()
    separator: tuple[str | int, ...] = ()
    end: tuple[str | int, ...] = ()
    is_compact: bool = True
    """Whether arguments are written with ", " and ": " and no other white space, as Python's json
    module writes them. Otherwise short white space is free, which small models need."""
    at_most_one: bool = False
    """Whether the form has no way to tell the results of several calls apart."""
    one_unless_asked: bool = False
    """Whether an answer has one call at most where the caller does not say that it may have
    several: a model that was not trained for the form repeats its calls."""
    text_may_precede: bool = False
    """Whether an answer may have text before its calls."""

    @property
    def has_ids(self) -> bool:
        """True if the model itself writes ids of calls."""
        return Slot.ID in self.call

    @property
    def trigger_id(self) -> int | None:
        """The control id that begins calls and nothing else, or None if text begins them."""
        first = (*self.begin, *self.call)[0]
        return first if isinstance(first, int) else None

    @property
    def trigger_text(self) -> str:
        """The text by which calls are recognised; "" if a control id begins them."""
        text = ""
        for piece in (*self.begin, *self.call):
            if not isinstance(piece, str):
                break
            text += piece
        return text
