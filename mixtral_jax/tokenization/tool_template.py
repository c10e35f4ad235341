"""The form of calls that a chat template writes, found by rendering small chats that call.

Templates say what they write in Jinja, which is a program: the form is read from what it writes of
calls whose names, arguments and ids are known. What is compared are tokens, because a tokenizer may
put spaces behind control tokens that the template does not write.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mixtral_jax.errors import ChatError
from mixtral_jax.tokenization.chat_template import ChatTemplate
from mixtral_jax.tokenization.messages import Message, ToolCall
from mixtral_jax.tokenization.tool_form import Piece, Slot, ToolForm
from mixtral_jax.tokenization.vocabulary import Vocabulary

_QUESTION: Message = {"role": "user", "content": "a"}
_CALLS: tuple[ToolCall, ...] = (
    {"id": "idOfFirst", "name": "name_of_first", "arguments": '{"key_of_first": "value"}'},
    {"id": "idOfOther", "name": "name_of_other", "arguments": '{"key_of_other": "value"}'},
)
_TOOLS = [
    {"name": call["name"], "description": "", "parameters": {"type": "object", "properties": {}}}
    for call in _CALLS
]
_CONTROL = 0xF0000  # control ids are written as characters of this plane, in order of appearance


def template_form(
    template: ChatTemplate, vocabulary: Vocabulary, ids: Callable[[str], list[int]]
) -> ToolForm | None:
    """Return the form in which a template writes calls; None if it has none, or no clear one.

    Args:
        template: as it is rendered for chats.
        vocabulary: bytes of the ids, and those that end an answer.
        ids: the ids of a text that the template has written.
    """
    if not template.takes_tools:
        return None
    turns = _Turns(template, vocabulary, ids)
    double = turns.text(_CALLS)
    spans = double and [_spans(double, call) for call in _CALLS]
    form = double and spans and all(spans) and _form_of_two(turns, double, spans[0], spans[1])
    if form:
        return form
    single = turns.text(_CALLS[:1])
    span = single and _spans(single, _CALLS[0])
    return _form_of_one(turns, single, span) if single and span else None


@dataclass(frozen=True)
class _Span:
    """Place of a slot in a text."""

    start: int
    end: int
    slot: Slot


class _Turns:
    """Texts that a template writes for an assistant's turn that calls."""

    def __init__(
        self, template: ChatTemplate, vocabulary: Vocabulary, ids: Callable[[str], list[int]]
    ) -> None:
        self._template = template
        self._vocabulary = vocabulary
        self._ids = ids
        self._controls: list[int] = []

    def text(self, calls: Sequence[ToolCall]) -> str | None:
        """Return the turn's text up to the end of the answer, control ids as characters.

        None if the template refuses it, or writes what goes before it otherwise.
        """
        answer: Message = {"role": "assistant", "content": "", "tool_calls": list(calls)}
        try:
            before = self._ids(self._template.render([_QUESTION], tools=_TOOLS))
            whole = self._ids(self._template.render([_QUESTION, answer, *_results(calls)],
                                                    tools=_TOOLS))  # fmt: skip
        except ChatError:
            return None
        turn = whole[len(before) :]
        end = next((i for i, n in enumerate(turn) if n in self._vocabulary.eos_ids), None)
        if whole[: len(before)] != before or end is None:
            return None
        text = b"".join(map(self._spelled, turn[:end])).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._vocabulary.dummy_space else text

    def pieces(self, text: str) -> tuple[str | int, ...]:
        """Return a text of `text` as texts and control ids."""
        made: list[str | int] = []
        for character in text:
            place = ord(character) - _CONTROL
            if 0 <= place < len(self._controls):
                made.append(self._controls[place])
            elif made and isinstance(made[-1], str):
                made[-1] += character
            else:
                made.append(character)
        return tuple(made)

    def _spelled(self, token_id: int) -> bytes:
        if data := self._vocabulary.token_bytes(token_id):
            return data
        if token_id not in self._controls:
            self._controls.append(token_id)
        return chr(_CONTROL + self._controls.index(token_id)).encode()


def _results(calls: Sequence[ToolCall]) -> list[Message]:
    """Return results, because some templates refuse a chat that ends with calls."""
    return [
        {"role": "tool", "content": "1", "tool_call_id": call["id"], "name": call["name"]}
        for call in calls
    ]


def _spans(text: str, call: ToolCall) -> list[_Span] | None:
    """Return where the slots of a call stand, in order; None if they do not stand there once."""
    key = call["arguments"].split('"')[1]
    arguments = rf'\{{\s*"{key}"\s*:\s*"value"\s*\}}'
    spans = []
    for slot, pattern in (
        (Slot.NAME, call["name"]),
        (Slot.ARGUMENTS, arguments),
        (Slot.ID, call["id"]),
    ):
        matches = list(re.finditer(pattern, text))
        if len(matches) > 1 or (not matches and slot is not Slot.ID):
            return None
        spans += [_Span(match.start(), match.end(), slot) for match in matches]
    return sorted(spans, key=lambda span: span.start)


def _form_of_two(
    turns: _Turns, text: str, first: list[_Span] | None, other: list[_Span] | None
) -> ToolForm | None:
    """Return the form of a turn with two calls: what they share is the call's, the rest around."""
    assert first
    assert other
    gaps = [_gaps(text, spans) for spans in (first, other)]
    if first[-1].end > other[0].start or gaps[0] != gaps[1]:
        return None
    before, between, after = (
        text[: first[0].start],
        text[first[-1].end : other[0].start],
        text[other[-1].end :],
    )
    head = _common_end(before, between)
    tail = _common_start(between[: len(between) - len(head)], after)
    return _form(
        turns,
        text,
        first,
        around=(head, tail),
        begin=before[: len(before) - len(head)],
        separator=between[len(tail) : len(between) - len(head)],
        end=after[len(tail) :],
    )


def _form_of_one(turns: _Turns, text: str, spans: list[_Span]) -> ToolForm | None:
    """Return the form of a template that writes one call only."""
    around = (text[: spans[0].start], text[spans[-1].end :])
    return _form(turns, text, spans, around=around, at_most_one=True)


def _form(
    turns: _Turns,
    text: str,
    spans: list[_Span],
    *,
    around: tuple[str, str],
    begin: str = "",
    separator: str = "",
    end: str = "",
    at_most_one: bool = False,
) -> ToolForm | None:
    call: list[Piece] = [*turns.pieces(around[0])]
    for gap, span in zip(["", *_gaps(text, spans)], spans, strict=True):
        call += [*turns.pieces(gap), span.slot]
    call += turns.pieces(around[1])
    arguments = next(text[s.start : s.end] for s in spans if s.slot is Slot.ARGUMENTS)
    form = ToolForm(
        call=tuple(call),
        begin=turns.pieces(begin),
        separator=turns.pieces(separator),
        end=turns.pieces(end),
        is_compact=arguments == json.dumps(json.loads(arguments)),
        at_most_one=at_most_one,
        text_may_precede=True,
    )
    # Too short a text would be met in any answer.
    is_clear = form.trigger_id is not None or len(form.trigger_text.strip()) > 3
    return form if is_clear else None


def _gaps(text: str, spans: Sequence[_Span]) -> list[str]:
    return [text[before.end : after.start] for before, after in pairwise(spans)]


def _common_start(first: str, second: str) -> str:
    size = 0
    while size < min(len(first), len(second)) and first[size] == second[size]:
        size += 1
    return first[:size]


def _common_end(first: str, second: str) -> str:
    return _common_start(first[::-1], second[::-1])[::-1]
