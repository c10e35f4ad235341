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
