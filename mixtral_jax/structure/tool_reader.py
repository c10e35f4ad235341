"""ToolReader: the calls in an answer that is still growing, read token by token.

It follows the form of the model's calls (`ToolForm`), not patterns in text. Where a control id
begins calls, a text that merely mentions "[TOOL_CALLS]" stays text.
"""

import string
from collections.abc import Callable

from mixtral_jax.tokenization.call_ids import ID_LENGTH, new_call_id
from mixtral_jax.tokenization.messages import ToolCall
from mixtral_jax.tokenization.tokenizer import Tokenizer
from mixtral_jax.tokenization.tool_form import Piece, Slot, ToolForm

_ID_CHARACTERS = frozenset(string.ascii_letters + string.digits)
_NAME_CHARACTERS = _ID_CHARACTERS | set("_.-")


class ToolReader:
    """Reads one answer of a model that may call tools. Make a new one for each choice.

    Text that cannot be the beginning of calls any more is given out at once. What is inside of a
    call is given out when that call ends, and never if it does not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        continues: bool = False,
        text_may_precede: bool = True,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """Begins an answer.

        Args:
            tokenizer: that of the model.
            continues: whether the answer continues a prompt's text, so that its first space stays.
            text_may_precede: whether the answer may have text before its calls, where the form lets
                it. Else a text in which calls seem to begin is text.
            new_id: makes the ids of calls in forms that have none.
        """
        self._tokenizer = tokenizer
        self._form = tokenizer.tool_form
        self._text_may_precede = text_may_precede and self._form.text_may_precede
        self._new_id = new_id
        self._detokenizer = tokenizer.detokenizer(continues=continues)
        self._held = ""  # text that may be the beginning of calls
        self._may_begin = bool(self._form.trigger_text)
        self._calls: _Calls | None = None  # while inside of calls
        self._ids: set[str] = set()

    @property
    def is_inside_call(self) -> bool:
        """True if an answer that ended here would lose a call that it has begun."""
        return self._calls is not None and not self._calls.may_end

    def push(self, token_id: int) -> tuple[str, list[ToolCall]]:
        """Returns the text that is certain and the calls that are whole once this token has come.

        Raises ValueError for a negative id.
        """
        if self._tokenizer.token_bytes(token_id):
            return self._read(self._detokenizer.push(token_id))
        if self._calls is not None:
            return self._read_control(token_id)
        if token_id != self._form.trigger_id:
            return "", []
        text = self._detokenizer.finish()
        self._begin()
        more, calls = self._read_control(token_id)
        return text + more, calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Returns the rest when no more tokens come. A call that is not whole is left out."""
        text, calls = self._read(self._detokenizer.finish())
        text += self._held
        self._held, self._calls = "", None
        return text, calls

    def _begin(self) -> None:
        self._calls = _Calls(self._form)
        # The first space of a text behind a control token is a piece of the form.
        self._detokenizer = self._tokenizer.detokenizer(continues=True)

    def _read_control(self, token_id: int) -> tuple[str, list[ToolCall]]:
        if token_id in self._tokenizer.eos_ids:
            return "", []
        text, calls = self._read(self._detokenizer.finish())
        self._detokenizer = self._tokenizer.detokenizer(continues=True)
        if self._calls is not None and not self._calls.take(token_id):
            text += self._left_over()
        return text, calls + self._whole()

    def _read(self, text: str) -> tuple[str, list[ToolCall]]:
        if not text:
            return "", []
        if self._calls is None:
            before, text = self._cut_at_trigger(self._held + text)
            if not text:
                return before, []
            self._calls = _Calls(self._form)
        else:
            before = ""
        calls: list[ToolCall] = []
        for place, character in enumerate(text):
            if not self._calls.take(character):
                calls += self._whole()
                before += self._left_over()
                more, others = self._read(text[place:])
                return before + more, calls + others
        return before, self._whole()

    def _cut_at_trigger(self, text: str) -> tuple[str, str]:
        """Returns the text before the calls, and the calls as far as they have come, or "".

        What may still become the trigger is held back.
        """
        self._held = ""
        trigger = self._form.trigger_text
        if not self._may_begin:
            return text, ""
        if self._text_may_precede:
            place = text.find(trigger)
            if place >= 0:
                return text[:place], text[place:]
            for size in range(min(len(trigger) - 1, len(text)), 0, -1):
                if trigger.startswith(text[-size:]):
                    self._held = text[-size:]
                    return text[:-size], ""
            return text, ""
        if text.startswith(trigger):
            self._may_begin = False
            return "", text
        if trigger.startswith(text):
            self._held = text
            return "", ""
        self._may_begin = False
        return text, ""

    def _left_over(self) -> str:
        """Ends the calls, and returns what was taken of one that is not in the form, as text."""
        assert self._calls is not None
        text = "" if self._calls.may_end else "".join(self._calls.taken)
        self._calls = None
        return text

    def _whole(self) -> list[ToolCall]:
        """Returns the calls that have ended since the last time."""
        if self._calls is None:
            return []
        calls, self._calls.whole = self._calls.whole, []
        for call in calls:
            while not call["id"] or call["id"] in self._ids:  # a model may write one twice
                call["id"] = self._new_id()
            self._ids.add(call["id"])
        return calls


class _Calls:
    """Place of an answer within its calls, from their beginning to their end.

    Symbols are the characters of text and the ids of control tokens.
    """

    def __init__(self, form: ToolForm) -> None:
        self._form = form
        self._pieces: list[Piece] = [*form.begin, *form.call]
        self._is_call = True  # whether the pieces to come end a call
        self._done = 0  # characters of the first piece, if that is text
        self._slots: dict[Slot, list[str]] = {slot: [] for slot in Slot}
        self._object = _ObjectEnd()
        self.whole: list[ToolCall] = []
        self.taken: list[str] = []
        """Characters since the last whole call, or since the beginning."""

    @property
    def may_end(self) -> bool:
        """True if the answer may end here: behind all that calls have, or behind a call."""
        return not self._pieces

    def take(self, symbol: str | int) -> bool:
        """Takes in a symbol. Returns False if it may not stand here."""
        if not self._pieces and not self._choose(symbol):
            return False
        piece = self._pieces[0]
        if piece is Slot.NAME and self._slots[piece] and symbol not in _NAME_CHARACTERS:
            self._pieces.pop(0)
            return self.take(symbol)
        if isinstance(symbol, str):
            self.taken.append(symbol)
        if not self._fits(piece, symbol):
            if isinstance(symbol, str):
                self.taken.pop()
            return False
        if not self._pieces and self._is_call:
            self._end_call()
        return True

    def _choose(self, symbol: str | int) -> bool:
        """Chooses between another call and the end, by its first symbol."""
        if not self._is_call:
            return False
        for pieces, is_call in (
            ((*self._form.separator, *self._form.call), True),
            (self._form.end, False),
        ):
            first = pieces[0] if pieces else None
            if first == symbol or (isinstance(first, str) and first[0] == symbol):
                self._pieces, self._is_call = list(pieces), is_call
                return True
        return False

    def _fits(self, piece: Piece, symbol: str | int) -> bool:
        """Returns whether the symbol continues the piece, and drops a piece that ends."""
        if isinstance(piece, int) or isinstance(symbol, int):
            is_right = piece == symbol
            ends = is_right
        elif isinstance(piece, str):
            is_right = piece[self._done] == symbol
            self._done = (self._done + is_right) % len(piece)
            ends = is_right and self._done == 0
        else:
            self._slots[piece].append(symbol)
            match piece:
                case Slot.NAME:
                    is_right, ends = symbol in _NAME_CHARACTERS, False
                case Slot.ID:
                    is_right = symbol in _ID_CHARACTERS
                    ends = len(self._slots[piece]) == ID_LENGTH
                case _:
                    is_right = self._object.take(symbol)
                    ends = self._object.has_ended
        if ends and is_right:
            self._pieces.pop(0)
        return is_right

    def _end_call(self) -> None:
        slots = {slot: "".join(characters) for slot, characters in self._slots.items()}
        self.whole.append(
            {"id": slots[Slot.ID], "name": slots[Slot.NAME], "arguments": slots[Slot.ARGUMENTS]}
        )
        self._slots = {slot: [] for slot in Slot}
        self._object = _ObjectEnd()
        self.taken.clear()


class _ObjectEnd:
    """Finder of the brace that ends a JSON object."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self.has_ended = False

    def take(self, character: str) -> bool:
        """Takes in a character. Returns False if the first one begins no object."""
        if self._depth == 0 and character != "{":
            return False
        if self._is_escaped:
            self._is_escaped = False
        elif self._in_string:
            self._is_escaped = character == "\\"
            self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.has_ended = self._depth == 0
        return True
