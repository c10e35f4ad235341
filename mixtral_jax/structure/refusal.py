"""Refusals of llguidance, in sentences for whoever wrote the structure.

llguidance repeats lines of the grammar, among them those that our own code wrote, and names its
inner limits: neither helps a caller. https://github.com/guidance-ai/llguidance
"""

import re

_LONGEST = 300  # characters of what is quoted
_TOO_LARGE = "the structure is too large or too ambiguous to be compiled: make it smaller"
_CARET = re.compile(
    r"regex parse error:\n    (?P<line>[^\n]*)\n(?P<before> *)\^+\nerror: (?P<why>.*)"
)
_MEANINGS = (
    (re.compile(r"^NoExtension"), "no text of this model matches the structure"),
    (re.compile(r"too deeply nested|nest limit"), "the structure nests too deeply to be compiled"),
    (re.compile(r"too (big|large|many|complex)|\blimit\b|\bfuel\b", re.IGNORECASE), _TOO_LARGE),
)
_UNKNOWN = re.compile(r'unknown name: "(?P<name>[^"\n]*)"')
_PLACE = re.compile(r"^(?:at )?(?P<line>\d+)\(\d+\): ")
_UNSATISFIABLE = "Unsatisfiable schema: "


def refusal(text: str) -> str:
    """Returns what llguidance has said about a grammar as a sentence.

    Whatever is not known is quoted, in one line, without the grammar's own lines.
    """
    text = text.removesuffix("<non-verbose/>").strip()
    if (wrong := _CARET.search(text)) is not None:
        place = len(wrong["before"]) - 4
        why = _quoted(wrong["why"])
        return f"the regular expression is refused at its character {place + 1}: {why}"
    for pattern, meaning in _MEANINGS:
        if pattern.search(text):
            return meaning
    if text.startswith(_UNSATISFIABLE):
        why = _quoted(text.removeprefix(_UNSATISFIABLE))
        return f"no value matches the schema, whose rules contradict each other: {why}"
    first = text.partition("\n")[0]
    line = _PLACE.match(first)
    where = f"line {line['line']} of the grammar" if line else "the structure"
    if (unknown := _UNKNOWN.search(first)) is not None:
        return f"{where} uses the name {_quoted(unknown['name'])!r}, which no rule has"
    return f"{where} cannot be compiled: {_quoted(_PLACE.sub('', first))}"


def _quoted(text: str) -> str:
    line = text.partition("\n")[0].strip()
    return line if len(line) <= _LONGEST else line[:_LONGEST] + " ..."
