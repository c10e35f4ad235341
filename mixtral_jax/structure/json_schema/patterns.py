"""Regular expressions of JSON Schemas (ECMA-262) written for the engine that enforces them.

Validators read `pattern` by ECMA-262 or by Python's `re`; where they differ (what \\w, \\s, \\D and
the dot match outside ASCII) the written expression matches only what every one of them matches.
Anchors become the whole: the result matches a text from its beginning to its end.

https://262.ecma-international.org/#sec-patterns
"""

import re
from dataclasses import dataclass, field

MAX_REPEAT = 100_000
_MAX_GROUPS = 50  # within each other

# Expressions with look-ahead that libraries write, and the same without it.
_KNOWN = {
    # pydantic 2.12, Decimal
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?(\d+\.?\d*|\.\d+)$",
    # zod 4, email
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+"
    r"[A-Za-z]{2,}$": r"^([A-Za-z0-9_'+\-]+\.)*[A-Za-z0-9_'+\-]*[A-Za-z0-9_+-]@"
    r"([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
}
_DECIMAL_OF_DIGITS = re.compile(
    r"\^\(\?!\^\[-\+\.\]\*\$\)\[\+-\]\?0\*\\d\{0,(\d+)\}\\\.\?\\d\{0,(\d+)\}0\*\$"
)

_TWO_DIGITS = re.compile("[0-9A-Fa-f]{2}")
_FOUR_DIGITS = re.compile(r"[0-9A-Fa-f]{4}|\{[0-9A-Fa-f]{1,6}\}")
_ANY = "(?s:.*)"
# Characters that every reading takes as a space, and those that any reading takes as such.
_SPACE_ALL = r"\t\n\x0b\x0c\r \xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_SPACE_ANY = _SPACE_ALL + r"\x1c-\x1f\x85\x{feff}"
_NARROW = {"d": "0-9", "w": "0-9A-Za-z_", "s": _SPACE_ALL}
_WIDE = {"d": r"\p{Nd}", "w": r"\p{L}\p{N}\p{M}_", "s": _SPACE_ANY}
_CONTROLS = {"f": 12, "n": 10, "r": 13, "t": 9, "v": 11}
_CATEGORY = re.compile("L[ulmto]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?")


class UnsupportedPattern(ValueError):
    """An expression that is wrong, or that cannot be matched without going back."""


def translate(pattern: str) -> str:
    """Returns an expression for the whole text. Raises UnsupportedPattern with what is in the way.

    It is anchored, and has neither groups that capture nor escapes that engines read differently.
    """
    pattern = _KNOWN.get(pattern, pattern)
    if match := _DECIMAL_OF_DIGITS.fullmatch(pattern):
        # pydantic 2.12, Decimal with max_digits and decimal_places.
        whole, places = match.groups()
        pattern = rf"^[+-]?(0*\d{{1,{whole}}}\.?\d{{0,{places}}}0*|0*\.\d{{1,{places}}}0*|0+\.?0*)$"
        if int(whole) == 0 or int(places) == 0:
            raise UnsupportedPattern("a look-ahead")
    parser = _Parser(pattern)
    node = parser.alternatives(0)
    if parser.place < len(pattern):
        raise UnsupportedPattern(f"a bracket that was not opened, at {parser.place}")
    return f"^(?:{_whole(node, 0)})$"


@dataclass
class _Node:
    """A piece of an expression: text to match, an anchor, or a group of alternatives."""

    text: str = ""
    anchor: str = ""
    alternatives: list[list["_Node"]] = field(default_factory=list)
    repeat: str = ""
    repeats: int = 1  # repetitions within repetitions

    @property
    def has_anchor(self) -> bool:
        return bool(self.anchor) or any(
            item.has_anchor for sequence in self.alternatives for item in sequence
        )

    def write(self) -> str:
        if self.anchor:
            raise UnsupportedPattern(f"{self.anchor!r} within the expression")
        if not self.alternatives:
            return self.text + self.repeat
        inner = "|".join(
            "".join(item.write() for item in sequence) for sequence in self.alternatives
        )
        return f"(?:{inner}){self.repeat}"


def _whole(node: _Node, depth: int) -> str:
    """Writes alternatives so that they match a whole text, by their anchors at its two ends."""
    rows = []
    for sequence in node.alternatives:
        items = list(sequence)
        alone = len(items) == 1 and items[0].alternatives and not items[0].repeat
        if alone and items[0].has_anchor and depth < _MAX_GROUPS:
            rows.append(_whole(items[0], depth + 1))
            continue
        before, after = _ANY, _ANY
        while items and items[0].anchor == "^":
            items.pop(0)
            before = ""
        while items and items[-1].anchor == "$":
            items.pop()
            after = ""
        rows.append(before + "".join(item.write() for item in items) + after)
    return "|".join(rows)


class _Parser:
    """Reader of one expression, from left to right."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.place = 0

    def next(self) -> str:
        if self.place >= len(self.pattern):
            raise UnsupportedPattern("an end where more was expected")
        self.place += 1
        return self.pattern[self.place - 1]

    def peek(self, text: str) -> bool:
        return self.pattern.startswith(text, self.place)

    def alternatives(self, depth: int) -> _Node:
        if depth > _MAX_GROUPS:
            raise UnsupportedPattern(f"more than {_MAX_GROUPS} groups within each other")
        rows: list[list[_Node]] = [[]]
        while self.place < len(self.pattern) and not self.peek(")"):
            if self.peek("|"):
                self.place += 1
                rows.append([])
            else:
                rows[-1].append(self.term(depth))
        repeats = max((item.repeats for row in rows for item in row), default=1)
        return _Node(alternatives=rows, repeats=repeats)

    def term(self, depth: int) -> _Node:
        character = self.next()
        if character in "^$":
            return _Node(anchor=character)
        if character == "(":
            node = self.group(depth)
        elif character == "[":
            node = _Node(self.character_class())
        elif character == ".":
            node = _Node(r"[^\n\r\x{2028}\x{2029}]")
        elif character == "\\":
            node = _Node(self.escape())
        elif character in "*+?":
            raise UnsupportedPattern(f"{character!r} with nothing to repeat")
        else:
            node = _Node(literal(character))
        self.quantifier(node)
        return node

    def group(self, depth: int) -> _Node:
        if self.peek("?"):
            match = re.compile(r"\?(?::|<[A-Za-z_]\w*>|P<[A-Za-z_]\w*>)").match(
                self.pattern, self.place
            )
            if match is None:
                sign = self.pattern[self.place + 1 : self.place + 3]
                known = sign[:1] in ("=", "!") or sign in ("<=", "<!")
                raise UnsupportedPattern("look-around" if known else f"a group (?{sign[:1]}")
            self.place = match.end()
        node = self.alternatives(depth + 1)
        if not self.peek(")"):
            raise UnsupportedPattern("a bracket that is not closed")
        self.place += 1
        return node

    def quantifier(self, node: _Node) -> None:
        match = re.compile(r"[*+?]|\{(\d+)(?:(,)(\d*))?\}").match(self.pattern, self.place)
        if match is None:
            if re.compile(r"\{,\d+\}").match(self.pattern, self.place):
                raise UnsupportedPattern("a repetition without its least number")
            return
        self.place = match.end()
        node.repeat = match[0]
        if match[1]:
            if max(len(match[1]), len(match[3] or "")) > 9:
                raise UnsupportedPattern("too many repetitions")
            least, repeats = int(match[1]), int(match[3] or match[1])
            if least > repeats:
                raise UnsupportedPattern("a repetition with a larger least than greatest number")
            product = node.repeats * max(repeats, 1)
            if repeats > MAX_REPEAT or (node.repeats > 1 and product > MAX_REPEAT // 5):
                raise UnsupportedPattern("too many repetitions")
            node.repeats = product
        if self.peek("?"):
            self.place += 1  # the shortest match first: the same texts
        if re.compile(r"[*+?]|\{\d+(,\d*)?\}").match(self.pattern, self.place):
            raise UnsupportedPattern("a repetition of a repetition")

    def escape(self) -> str:
        """Reads what follows a backslash outside a class."""
        character = self.pattern[self.place : self.place + 1]
        if character and character in "dws":
            self.place += 1
            return f"[{_NARROW[character]}]"
        if character and character in "DWS":
            self.place += 1
            return f"[^{_WIDE[character.lower()]}]"
        if character and character in "pP":
            return f"[{self.category()}]"
        if character and character in "bB":
            raise UnsupportedPattern("a word boundary")
        if character == "k" or character in tuple("123456789"):
            raise UnsupportedPattern("a back-reference")
        return literal(chr(self.code_point()))

    def category(self) -> str:
        match = re.compile(r"([pP])\{(?:gc=|General_Category=)?(\w+)\}").match(
            self.pattern, self.place
        )
        if match is None or not _CATEGORY.fullmatch(match[2]):
            raise UnsupportedPattern("a property of Unicode other than a general category")
        self.place = match.end()
        return f"\\{match[1]}{{{match[2]}}}"

    def code_point(self) -> int:
        """Reads an escape of one character after its backslash."""
        character = self.next()
        if character in _CONTROLS:
            return _CONTROLS[character]
        if character in "xu":
            forms = _TWO_DIGITS if character == "x" else _FOUR_DIGITS
            match = forms.match(self.pattern, self.place)
            if match is None:
                raise UnsupportedPattern(f"an incomplete \\{character}")
            self.place = match.end()
            code = int(match[0].strip("{}"), 16)
            low = re.compile(r"\\u([Dd][C-Fc-f][0-9A-Fa-f]{2})").match(self.pattern, self.place)
            if 0xD800 <= code < 0xDC00 and low:
                self.place = low.end()
                return 0x10000 + ((code - 0xD800) << 10) + int(low[1], 16) - 0xDC00
            if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
                raise UnsupportedPattern("half of a surrogate pair")
            return code
        if character == "c" and re.match("[A-Za-z]", self.pattern[self.place : self.place + 1]):
            return ord(self.next()) % 32
        if character == "0" and not re.match(r"\d", self.pattern[self.place : self.place + 1]):
            return 0
        if character.isalnum():
            raise UnsupportedPattern(f"an unknown escape \\{character}")
        return ord(character)

    def character_class(self) -> str:
        """Reads a class after its opening bracket."""
        negated = self.peek("^")
        self.place += negated
        if self.peek("]"):
            raise UnsupportedPattern("an empty class")
        words = _WIDE if negated else _NARROW
        items: list[str] = []
        start: int | None = None  # of a range that may begin here
        while not self.peek("]"):
            character = self.next()
            if character == "-" and start is not None and not self.peek("]"):
                end = self._class_character(self.next())
                if end < start:
                    raise UnsupportedPattern("a range whose end stands before its beginning")
                items[-1] = f"{literal(chr(start))}-{literal(chr(end))}"
                start = None
                continue
            following = self.pattern[self.place : self.place + 1]
            if character == "\\" and following and following in "dwsDWSpP":
                start = None
                items.append(self._class_words(following, words, negated))
                if self.peek("-") and not self.peek("-]"):
                    raise UnsupportedPattern("a range that begins with a class")
                continue
            start = self._class_character(character)
            items.append(literal(chr(start)))
        self.place += 1
        return f"[{'^' if negated else ''}{''.join(items)}]"

    def _class_words(self, letter: str, words: dict[str, str], negated: bool) -> str:
        if letter in "pP":
            return self.category()
        self.place += 1
        if letter in words:
            return words[letter]
        opposite = _NARROW if negated else _WIDE
        return f"[^{opposite[letter.lower()]}]"

    def _class_character(self, character: str) -> int:
        if character != "\\":
            if 0xD800 <= ord(character) < 0xE000:
                raise UnsupportedPattern("half of a surrogate pair")
            return ord(character)
        if self.peek("b"):
            self.place += 1
            return 8
        if self.peek("-"):
            self.place += 1
            return ord("-")
        return self.code_point()


def literal(character: str) -> str:
    """Writes a character so that no engine reads it as a sign of its own."""
    if character.isascii() and character.isalnum():
        return character
    if 0xD800 <= ord(character) < 0xE000:
        raise UnsupportedPattern("half of a surrogate pair")
    return f"\\x{{{ord(character):x}}}"
