"""Specification: what an answer must match, as a caller asks for it. Plain data, unchecked."""

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Kinds of structure that an answer can be held to."""

    JSON_OBJECT = "json_object"  # any JSON object
    JSON_SCHEMA = "json_schema"  # the text of a JSON Schema, draft 2020-12
    REGEX = "regex"  # a regular expression, without look-around
    CHOICE = "choice"  # one of several texts
    LARK = "lark"  # a grammar in Lark's notation
    GBNF = "gbnf"  # a grammar in llama.cpp's notation


@dataclass(frozen=True)
class Specification:
    """Structure that the text of an answer must have."""

    kind: Kind
    text: str = ""
    """The schema as JSON, the expression or the grammar; empty for JSON_OBJECT and CHOICE."""
    choices: tuple[str, ...] = ()
    """Of CHOICE."""
    strict: bool = False
    """Refuses a schema of which a part cannot be enforced; else that part is listed as weakened."""


@dataclass(frozen=True)
class Check:
    """A schema of which a part is not enforced, so that a finished answer is checked against it."""

    schema: str
    """The caller's, as JSON, in a form that is known to be right."""
    draft: str
    """Draft that it is read in."""
    tool: str = ""
    """Name of the function whose arguments it describes; empty for the text of an answer."""


@dataclass(frozen=True)
class Grammar:
    """A grammar that our own code wrote, such as that of tool calls.

    It may name control ids, which a caller's grammar may not.
    """

    text: str
    """In llguidance's notation: Lark, or the JSON of several grammars."""
    begins_after: int | None = None
    """The control id after which it begins; the grammar itself begins with that id."""
    weakened: tuple[str, ...] = ()
    """What it does not enforce though the caller asked for it, each with its pointer."""
    checks: tuple[Check, ...] = ()
    """Schemas that a finished answer is to be checked against."""
