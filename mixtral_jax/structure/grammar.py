"""Grammars: what a caller asks for, checked and written in llguidance's notation.

Everything here grows with what a caller sent, so that it runs in the trial's process.

A tokenizer of sentencepiece's kind puts a space before each text, which the detokenizer takes off
again. A grammar for it demands that space: then the text is the grammar's, and every natural way to
write it in tokens is allowed. Without it a model could not begin with the token it would choose.
"""

import json
from collections.abc import Callable
from typing import Any

from llguidance import regex_to_lark

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.gbnf import lark_of
from mixtral_jax.structure.lark import checked
from mixtral_jax.structure.schema import Schema, checks_of, read, settle
from mixtral_jax.structure.specification import Grammar, Kind, Specification

LARGEST_SCHEMA = 256 << 10  # bytes of UTF-8, as all of these
LARGEST_TEXT = 64 << 10  # of a grammar, an expression or all choices
MOST_CHOICES = 4096
WHITESPACE = r"[ \n\t\r]{1,8}"
"""What may stand between the parts of a JSON text; unbounded, small models write nothing else."""


def grammar_of(specification: Specification, *, space: bool) -> Grammar:
    """Returns the grammar of what a caller asks for.

    Args:
        specification: What the answer must match.
        space: Whether a space must stand before the answer.

    Raises StructureError, with the pointer of the part where that is known.
    """
    check_size(specification)
    text = specification.text
    match specification.kind:
        case Kind.JSON_OBJECT:
            return Grammar(_json_grammar('{"type": "object"}', space))
        case Kind.JSON_SCHEMA:
            return _schema_grammar(read(text, specification.strict), space)
        case Kind.REGEX:
            return Grammar(_terminal(f"/{regex_to_lark(text, '')}/", space))
        case Kind.CHOICE:
            choices = " | ".join(_literal(choice) for choice in specification.choices)
            return Grammar(_terminal(f"({choices})", space))
        case Kind.GBNF:
            text = lark_of(text)
        case Kind.LARK:
            pass
    return _lark(text, specification.strict, space)


def tried_specification(
    specification: Specification, *, space: bool, attempt: Callable[[Grammar], object]
) -> Grammar:
    """Returns the grammar of what a caller asks for after it was tried.

    Where the compiler refuses a schema, the rules that it refuses are left out, or, where the
    caller is strict, named by their pointers.

    Args:
        specification: What the answer must match.
        space: Whether a space must stand before the answer.
        attempt: Compiles a grammar; raises StructureError if it is refused.

    Raises StructureError.
    """
    grammar = grammar_of(specification, space=space)
    try:
        attempt(grammar)
        return grammar
    except StructureError:
        if specification.kind is not Kind.JSON_SCHEMA:
            raise

    def compiles(schema: Schema) -> None:
        attempt(Grammar(_json_grammar(schema.text, space)))

    return _schema_grammar(settle(specification.text, compiles, specification.strict), space)


def check_size(specification: Specification) -> None:
    """Raises StructureError for what is empty or too large to be looked at."""
    kind = specification.kind
    if kind is Kind.JSON_OBJECT:
        return
    if kind is Kind.CHOICE:
        if not specification.choices:
            raise StructureError("choice has no texts: give one or more")
        if len(specification.choices) > MOST_CHOICES:
            raise StructureError(f"choice has more than {MOST_CHOICES} texts")
        size = sum(len(choice.encode()) for choice in specification.choices)
    else:
        size = len(specification.text.encode())
        if not size:
            raise StructureError(f"the {kind.value} is empty")
    limit = LARGEST_SCHEMA if kind is Kind.JSON_SCHEMA else LARGEST_TEXT
    if size > limit:
        raise StructureError(f"the {kind.value} has {size} bytes; at most {limit} are read")


def _with_options(schema: str) -> dict[str, Any]:
    """Returns a schema with our options for the compiler in the place of the caller's."""
    value = json.loads(schema)
    if not isinstance(value, dict):
        value = {} if value is True else {"not": {}}
    return {**value, "x-guidance": {"whitespace_pattern": WHITESPACE}}


def _schema_grammar(schema: Schema, space: bool) -> Grammar:
    text = _json_grammar(schema.text, space)
    return Grammar(text, weakened=schema.weakened, checks=checks_of(schema))


def _json_grammar(schema: str, space: bool) -> str:
    return _several({"json_schema": _with_options(schema)}, space)


def _several(answer: dict[str, Any], space: bool) -> str:
    """Returns the grammar of an answer, with a space before it or not.

    The caller's grammar is one of its own within ours: neither its names nor what it ignores
    between its parts can meet the space.
    """
    if not space:
        return json.dumps({"grammars": [answer]})
    first = {"lark_grammar": 'start: " " @answer'}
    return json.dumps({"grammars": [first, {"name": "answer", **answer}]})


def _terminal(expression: str, space: bool) -> str:
    """Returns the grammar of one terminal: the whole answer matches one regular expression."""
    before = '" " ' if space else ""
    return f"start: ANSWER\nANSWER: {before}BODY\nBODY: {expression}\n"


def _literal(text: str) -> str:
    """Returns a text as a string of Lark, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _lark(text: str, strict: bool, space: bool) -> Grammar:
    weakened: list[str] = []

    def enforced(schema: str) -> str:
        read_schema = read(schema, strict)
        weakened.extend(read_schema.weakened)
        return json.dumps(_with_options(read_schema.text))

    answer = {"lark_grammar": checked(text, enforced)}
    return Grammar(_several(answer, space), weakened=tuple(weakened))
