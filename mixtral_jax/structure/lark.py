"""Lark grammars of callers: what may stand in them, and how they are written anew.

A caller's grammar is cut into tokens by the rules of llguidance's own lexer and put together again
from them, so that it cannot read anything else than what was checked here. Refused are names of
control tokens, which would let a caller's grammar draw them; options of the compiler; `&` and `~`
between expressions, whose cost has no bound; and attributes that llguidance obeys only by taking
tokens back.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mixtral_jax.errors import StructureError

DEEPEST = 200  # rules within rules; the compiler calls itself for each
_TOKENS = re.compile(
    r"""
    (?P<space>[ \t]+|(?:\#|//)[^\n]*)
  | (?P<newline>(?:\r?\n)+)
  | (?P<string>"(?:\\(?:["\\/bfnrt]|u[a-fA-F0-9]{4})|[^"\\\x00-\x1f\x7f])*"i?)
  | (?P<regex>/(?:\\.|[^/\\])+/[imslux]*)
  | (?P<statement>%[a-z]+)
  | (?P<name>!?[_?]?[a-z][_a-z0-9-]*|_?[A-Z][_A-Z0-9-]*)
  | (?P<number>[+-]?[0-9]+)
  | (?P<mark>->|\.\.|[:,.()\[\]{}=|+*?~])
    """,
    re.VERBOSE,
)
_ATTRIBUTES = {"capture", "lazy", "suffix"}
_REFUSED = {
    "<": "names of control tokens (<...>) may not stand in a grammar",
    "@": "names of other grammars (@...) may not stand in a grammar",
    "&": "`&` between expressions is refused, because its cost has no bound",
}


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int


def checked(text: str, read_schema: Callable[[str], str]) -> str:
    """Returns a caller's grammar, written anew.

    Args:
        text: The grammar.
        read_schema: Reads the schema of a `%json` and returns that which is to be enforced.

    Raises StructureError with the line and the thing that is refused.
    """
    tokens = list(_tokens(text, read_schema))
    _refuse_marks(tokens)
    rules = _rules(tokens)
    if "start" not in rules:
        raise StructureError("the grammar has no rule named start")
    _refuse_deep(rules)
    lines: list[str] = []
    for token in tokens:
        lines.append("\n" if token.kind == "newline" else token.text + " ")
    return "".join(lines)


def _tokens(text: str, read_schema: Callable[[str], str]) -> Iterator[_Token]:
    place, line = 0, 1
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    while place < len(text):
        match = _TOKENS.match(text, place)
        if match is None:
            reason = _REFUSED.get(text[place], f"{text[place : place + 20]!r} is not understood")
            raise StructureError(f"line {line} of the grammar: {reason}")
        kind = str(match.lastgroup)
        token = _Token(kind, match[0], line)
        place, line = match.end(), line + match[0].count("\n")
        if kind == "statement":
            if token.text not in ("%ignore", "%import", "%json", "%regex"):
                raise StructureError(f"line {line} of the grammar: {token.text} is not supported")
            if token.text in ("%json", "%regex"):
                begin = place + len(text[place:]) - len(text[place:].lstrip(" \t\r\n"))
                try:
                    _, end = decoder.raw_decode(text, begin)
                except (ValueError, RecursionError) as error:
                    raise StructureError(
                        f"line {line} of the grammar: {token.text} is not followed by JSON: {error}"
                    ) from error
                value = text[begin:end]
                read = read_schema if token.text == "%json" else _same_json
                token = _Token("value", f"{token.text} {read(value)}", line)
                place, line = end, line + text.count("\n", place, end)
        if kind != "space":
            yield token


def _same_json(text: str) -> str:
    return json.dumps(json.loads(text), ensure_ascii=False)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _refuse_marks(tokens: list[_Token]) -> None:
    """Raises StructureError for `~` that is no repetition, and for attributes that are refused."""
    for place, token in enumerate(tokens):
        following = tokens[place + 1] if place + 1 < len(tokens) else None
        if token.text == "~" and (following is None or following.kind != "number"):
            raise StructureError(
                f"line {token.line} of the grammar: `~` before an expression is refused, because "
                "its cost has no bound"
            )
    for place, token in enumerate(tokens):
        if token.text == "[" and place and tokens[place - 1].kind == "name":
            _refuse_attributes(tokens, place)


def _refuse_attributes(tokens: list[_Token], place: int) -> None:
    """Refuses attributes of the rule whose `[` stands at `place`.

    A `[` behind a name within a rule begins an optional part instead, which no colon follows.
    """
    end = place + 1
    while end < len(tokens) and tokens[end].text != "]":
        end += 1
    if end + 1 >= len(tokens) or tokens[end + 1].text != ":":
        return
    for before, token in zip(tokens[place:end], tokens[place + 1 : end], strict=False):
        is_key = before.text in ("[", ",")
        if is_key and token.text not in _ATTRIBUTES:
            raise StructureError(
                f"line {token.line} of the grammar: the attribute {token.text} is not supported; "
                f"{', '.join(sorted(_ATTRIBUTES))} are"
            )


def _rules(tokens: list[_Token]) -> dict[str, set[str]]:
    """Returns the names that each rule or terminal uses, by its name."""
    rules: dict[str, set[str]] = {}
    uses: set[str] = set()
    begins_line = True
    for place, token in enumerate(tokens):
        if token.kind == "newline":
            begins_line = True
            continue
        if begins_line and token.kind == "name" and _is_definition(tokens, place):
            uses = rules.setdefault(_plain(token.text), set())
        elif token.kind == "name":
            uses.add(_plain(token.text))
        begins_line = False
    return rules


def _is_definition(tokens: list[_Token], place: int) -> bool:
    """True if a colon follows the name at `place`, perhaps behind attributes or a priority."""
    for token in tokens[place + 1 :]:
        if token.kind == "newline":
            return False
        if token.text == ":":
            return True
    return False


def _plain(name: str) -> str:
    return name.lstrip("!?")


def _refuse_deep(rules: dict[str, set[str]]) -> None:
    """Raises StructureError if rules stand within rules deeper than the compiler may go."""
    seen: set[str] = set()
    for name in rules:
        stack = [iter([name])]
        while stack:
            following = next(stack[-1], None)
            if following is None:
                stack.pop()
            elif following in rules and following not in seen:
                if len(stack) > DEEPEST:
                    raise StructureError(f"rules stand within rules more than {DEEPEST} deep")
                seen.add(following)
                stack.append(iter(sorted(rules[following])))
