"""Grammars in llama.cpp's notation (GBNF), written in Lark's.

Rules that do not come back to themselves become terminals, which are matched as one expression. A
grammar without recursion is one expression altogether, and then nothing that it allows is lost. In
others a terminal takes as much text as it can, as in Lark.

https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md
"""

import json
import re
from collections.abc import Iterable

from mixtral_jax.errors import StructureError

_TOKENS = re.compile(
    r"""
    (?P<space>[ \t]+|\#[^\r\n]*)
  | (?P<newline>(?:\r\n|\r|\n))
  | (?P<string>"(?:\\.|[^"\\])*")
  | (?P<set>\[\^?(?:\\.|[^\]\\])*\])
  | (?P<repeat>[*+?]|\{\s*[0-9]*\s*(?:,\s*[0-9]*\s*)?\})
  | (?P<define>::=)
  | (?P<name>[A-Za-z0-9_-]+)
  | (?P<mark>[|().])
    """,
    re.VERBOSE | re.DOTALL,
)
_CHARACTER = re.compile(
    r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))|(.)", re.DOTALL
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", **{c: c for c in "\"\\[]-^/'"}}
_MOST_REPEATED = 1 << 16
_DEEPEST = 100  # parentheses within parentheses


def lark_of(text: str) -> str:
    """Returns a grammar in Lark's notation, whose rule `start` is the given grammar's `root`.

    Raises StructureError with the line of what is wrong.
    """
    rules = _Reader(text).rules()
    if "root" not in rules:
        raise StructureError("the grammar has no rule named root")
    for name, (_, uses, line) in rules.items():
        for other in sorted(uses - rules.keys()):
            raise StructureError(f"line {line} of the grammar: {name} uses {other}, which is none")
    terminals = _without_recursion(rules)
    names = {
        name: f"TERMINAL_{place}" if name in terminals else f"rule_{place}"
        for place, name in enumerate(rules)
    }
    lines = [f"start: {names['root']}"]
    for name, (words, _, _) in rules.items():
        body = " ".join(names[word[1:]] if word.startswith("@") else word for word in words)
        lines.append(f"{names[name]}: {body}")
    return "\n".join(lines) + "\n"


_Rules = dict[str, tuple[list[str], set[str], int]]
"""By name: the words of the body, of which those with @ name rules; the named rules; the line."""


class _Reader:
    """Reads a grammar once, from its beginning to its end."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str, int]] = []
        place, line = 0, 1
        while place < len(text):
            match = _TOKENS.match(text, place)
            if match is None:
                raise StructureError(
                    f"line {line} of the grammar: {text[place : place + 20]!r} is not understood"
                )
            if match.lastgroup != "space":
                self._tokens.append((str(match.lastgroup), match[0], line))
            place, line = match.end(), line + match[0].count("\n")
        self._tokens.append(("end", "the end", line))
        self._place = 0

    def rules(self) -> _Rules:
        """Returns the rules by their names."""
        rules: _Rules = {}
        while True:
            self._skip_newlines()
            kind, name, line = self._next()
            if kind == "end":
                return rules
            if kind != "name":
                raise self._error(f"{name[:20]!r} where a rule should begin", line)
            if name in rules:
                raise self._error(f"a second rule named {name}", line)
            kind, text, line = self._next()
            if kind != "define":
                raise self._error(f"{text[:20]!r} behind {name} instead of ::=", line)
            words = self._alternatives(0)
            kind, text, line_after = self._next()
            if kind not in ("newline", "end"):
                raise self._error(f"{text[:20]!r} where a rule should end", line_after)
            rules[name] = (words, {word[1:] for word in words if word.startswith("@")}, line)

    def _alternatives(self, depth: int) -> list[str]:
        """Returns the words of alternatives; at depth 0 a newline ends them unless | follows."""
        if depth > _DEEPEST:
            raise StructureError(f"the grammar nests more than {_DEEPEST} deep")
        words = self._sequence(depth)
        while True:
            begin = self._place
            self._skip_newlines()
            if self._tokens[self._place][1] != "|":
                if not depth:
                    self._place = begin
                return words
            self._place += 1
            words += ["|", *self._sequence(depth)]

    def _sequence(self, depth: int) -> list[str]:
        words: list[str] = []
        self._skip_newlines(only_if=depth > 0 or self._tokens[self._place - 1][1] in ("|", "::="))
        while True:
            kind, text, line = self._tokens[self._place]
            if kind == "newline" and depth:
                self._place += 1
                continue
            if text == "(" and kind == "mark":
                self._place += 1
                item = ["(", *self._alternatives(depth + 1), ")"]
                if self._next()[1] != ")":
                    raise self._error("a parenthesis that is not closed", line)
            elif kind in ("string", "set", "name") or text == ".":
                if kind == "name" and self._tokens[self._place + 1][0] == "define":
                    raise self._error(f"the rule {text} in the middle of another", line)
                self._place += 1
                item = [self._word(kind, text, line)]
            else:
                return words or ['""']
            while self._tokens[self._place][0] == "repeat":
                item = self._repeated(item, *self._next()[1:])
            words += item

    def _word(self, kind: str, text: str, line: int) -> str:
        if kind == "name":
            return f"@{text}"
        if kind == "string":
            characters = "".join(character for character, _ in self._characters(text[1:-1], line))
            return json.dumps(characters, ensure_ascii=False).replace("\x7f", "\\u007f")
        return "/(?s:.)/" if text == "." else self._set(text, line)

    def _set(self, text: str, line: int) -> str:
        """Returns a set of characters, each written by its number, so that none is an operator."""
        negated = text.startswith("[^")
        characters = list(self._characters(text[2 if negated else 1 : -1], line))
        parts: list[str] = []
        while characters:
            first, _ = characters.pop(0)
            last = first
            if len(characters) > 1 and characters[0] == ("-", False):
                last = characters[1][0]
                del characters[:2]
            if last < first:
                raise self._error(f"the range {first}-{last} in {text[:20]}", line)
            parts.append(f"\\x{{{ord(first):X}}}-\\x{{{ord(last):X}}}")
        if not parts:
            raise self._error(f"an empty set {text}", line)
        return f"/[{'^' if negated else ''}{''.join(parts)}]/"

    def _characters(self, text: str, line: int) -> Iterable[tuple[str, bool]]:
        """Returns the characters of a string or a set, and whether each was escaped."""
        for match in _CHARACTER.finditer(text):
            two, four, eight, escaped, plain = match.groups()
            if plain is not None:
                yield plain, False
            elif escaped is None:
                number = int(two or four or eight, 16)
                if number > 0x10FFFF or 0xD800 <= number < 0xE000:
                    raise self._error(f"{match[0]}, which is no character", line)
                yield chr(number), True
            elif escaped in _ESCAPES:
                yield _ESCAPES[escaped], True
            else:
                raise self._error(f"the escape {match[0]}", line)

    def _repeated(self, item: list[str], text: str, line: int) -> list[str]:
        if len(item) > 1 and item[0] != "(" or item[-1][0] in "*+?{":
            item = ["(", *item, ")"]
        if text in ("*", "+", "?"):
            return [*item, text]
        least, comma, highest = (piece.strip() for piece in text[1:-1].partition(","))
        low = int(least or 0)
        high = int(highest) if highest else None if comma else low
        if not (least or highest) or max(low, high or 0) > _MOST_REPEATED:
            raise self._error(f"the repetition {text[:20]}", line)
        if high is None:
            return [*item, "*"] if not low else [*item, f"{{{low},}}"]
        if high < low:
            raise self._error(f"the repetition {text}", line)
        return [*item, f"{{{low},{high}}}"] if high else ['""']

    def _skip_newlines(self, *, only_if: bool = True) -> None:
        while only_if and self._tokens[self._place][0] == "newline":
            self._place += 1

    def _next(self) -> tuple[str, str, int]:
        token = self._tokens[self._place]
        self._place = min(self._place + 1, len(self._tokens) - 1)
        return token

    def _error(self, wrong: str, line: int) -> StructureError:
        return StructureError(f"line {line} of the grammar has {wrong}")


def _without_recursion(rules: _Rules) -> set[str]:
    """Returns the rules that come back to no rule, themselves or another."""
    plain: set[str] = set()
    users: dict[str, list[str]] = {name: [] for name in rules}
    open_uses = {name: len(uses) for name, (_, uses, _) in rules.items()}
    for name, (_, uses, _) in rules.items():
        for other in uses:
            users[other].append(name)
    ready = [name for name, count in open_uses.items() if not count]
    while ready:
        name = ready.pop()
        plain.add(name)
        for user in users[name]:
            open_uses[user] -= 1
            if not open_uses[user]:
                ready.append(user)
    return plain
