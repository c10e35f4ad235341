"""Matchers: which tokens may follow in an answer that must match a grammar, by llguidance.

A grammar is text; `Guide` has the vocabulary that it is matched over. A matcher belongs to one
choice of one request: it takes in the tokens of the answer one by one, and writes a mask of the
tokens that may follow. Masks are bits: bit i of word w stands for the id 32 w + i.

https://github.com/guidance-ai/llguidance
"""

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask

from mixtral_jax.errors import StructureError, UserError
from mixtral_jax.structure.refusal import refusal

# Measured: they refuse none of 1,200 public schemas more than the defaults do, and objects with a
# thousand optional properties need the larger rows.
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    max_grammar_size=50_000,
    max_lexer_states=20_000,
    max_items_in_row=20_000,
    step_max_items=200_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
_LONGEST_FORCED = 512  # bytes of forced text that are written as tokens at once
_CUT = 64  # bytes of them that may be written otherwise with what follows
Result = TypeVar("Result")


@runtime_checkable
class Lexicon(Protocol):
    """Part of a tokenizer that a guide needs."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def eos_ids(self) -> Collection[int]:
        """Ids that end an answer."""

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of an id; b"" for control tokens."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, after bos where the model has one."""


class Guide:
    """A model's vocabulary as matchers read it. Thread-safe.

    Raises StructureError for a tokenizer without an id that ends an answer.

    Args:
        tokenizer: that of the model.
        width: V of the output layer, which may be more than the tokenizer's ids.
    """

    def __init__(self, tokenizer: Lexicon, width: int) -> None:
        if not tokenizer.eos_ids:
            raise StructureError(
                "this model's tokenizer has no id that ends an answer, so an answer cannot be held "
                "to a structure"
            )
        self.width = width
        self.words = -(-width // 32)
        self.eos_ids = frozenset(tokenizer.eos_ids)
        pieces = _Pieces(tokenizer, width)
        self.vocabulary = LLTokenizer(TokenizerWrapper(pieces), eos_token=sorted(tokenizer.eos_ids))
        self.text_lengths = np.array([len(piece) for piece in pieces.tokens])
        """Bytes of each id, [V]; 0 for control ids."""
        self.text_lengths[pieces.special_token_ids] = 0

    def matcher(self, grammar: str) -> "Matcher":
        """Returns a matcher at the beginning of an answer.

        Raises StructureError if the grammar is wrong, or so large that matching would be slow.
        """
        inner = _guarded(lambda: LLMatcher(self.vocabulary, grammar, log_level=0, limits=LIMITS))
        matcher = Matcher(inner, self)
        matcher.check()
        return matcher


class Matcher:
    """Place of one choice in its grammar. Used by one thread at a time; only `copy` may be called
    by several at once, on a matcher that is never moved.

    A matcher that has run into a limit is in error for good, and every method says so: llguidance
    itself would then allow the end of the answer alone, which would look whole.
    """

    def __init__(self, inner: LLMatcher, guide: Guide) -> None:
        self._inner = inner
        self._guide = guide
        self.words = guide.words
        """int32 of a mask."""
        self.end_ids = guide.eos_ids
        """Ids of which one ends an answer that is whole."""

    @property
    def has_ended(self) -> bool:
        """True if nothing but the end of the answer can follow, or if that was taken in too.

        Raises StructureError as `check` does.
        """
        self.check()
        return bool(self._inner.is_stopped())

    @property
    def may_end(self) -> bool:
        """True if the answer would be whole if it ended here. Raises StructureError."""
        may_end = _guarded(self._inner.is_accepting)
        self.check()
        return bool(may_end)

    def copy(self) -> "Matcher":
        """Returns another matcher at the same place, which has all that this one has computed."""
        return Matcher(self._inner.deep_copy(), self._guide)

    def check(self) -> None:
        """Raises StructureError if the grammar is wrong, or matching has run into a limit."""
        if self._inner.is_error():
            raise StructureError(refusal(str(self._inner.get_error())))

    def fill(self, mask: np.ndarray) -> None:
        """Writes the mask of the next token into `mask`: int32 of ceil(V / 32) words.

        Raises StructureError as `check` does, and where no token may follow.
        """
        _guarded(lambda: fill_next_token_bitmask(self._inner, mask.reshape(1, -1), 0))
        self.check()
        if not mask.any():
            raise StructureError("no token of this model may follow here")

    def consume(self, token_ids: Sequence[int]) -> None:
        """Takes in tokens of the answer, the id that ends it too.

        Raises StructureError for one that may not follow, and is in error then.
        """
        ids = list(token_ids)
        for place, token_id in enumerate(ids):
            if token_id in self._guide.eos_ids:
                self._consume(ids[:place])
                if not self.has_ended:  # where only an end can follow, llguidance takes none
                    self._consume(ids[place : place + 1])
                ids = ids[place + 1 :]
                break
        self._consume(ids)

    def _consume(self, ids: list[int]) -> None:
        if ids and not _guarded(lambda: self._inner.consume_tokens(ids)):
            self.check()
            raise StructureError("a token does not match the grammar")

    def forced(self) -> tuple[int, ...]:
        """Returns the tokens that must follow, as the tokenizer would write them; often none.

        Of a long text only the beginning. Raises StructureError as `check` does.
        """
        forced = _guarded(self._inner.compute_ff_tokens)
        self.check()
        return tuple(forced)

    def rewind(self) -> None:
        """Goes back to the beginning, and keeps all that was computed on the way."""
        _guarded(self._inner.reset)
        self.check()


def _guarded(call: Callable[[], Result]) -> Result:
    """Calls llguidance. Raises StructureError where its code stops with a Rust panic.

    A panic is no Exception in Python, and its class cannot be imported.
    """
    try:
        return call()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise StructureError("the grammar cannot be matched") from None


class _Pieces:
    """A tokenizer in the form that llguidance asks for its vocabulary."""

    def __init__(self, tokenizer: Lexicon, width: int) -> None:
        self._tokenizer = tokenizer
        size = min(tokenizer.vocab_size, width)
        # Ids of a padded output layer are empty, and so in no mask.
        self.tokens = [tokenizer.token_bytes(i) if i < size else b"" for i in range(width)]
        self.special_token_ids = [i for i in range(size) if not self.tokens[i]]
        for i in self.special_token_ids:
            # A name of its own, or else a grammar that allows one control id allows all of them.
            self.tokens[i] = f"<control {i}>".encode()
        self.eos_token_id = min(tokenizer.eos_ids)
        self.bos_token_id: int | None = None

    def __call__(self, text: str | bytes) -> list[int]:
        """Returns the ids of a text that stands in the middle of an answer.

        An exception would end the whole process of some callers, and ids that spell anything else
        would be wrong tokens in an answer: then the longest pieces are taken instead.
        """
        data = text if isinstance(text, bytes) else text.encode()
        if len(data) > _LONGEST_FORCED:
            return self._beginning(data)
        plain = data.decode("utf-8", "replace")
        # A newline takes the space that some tokenizers put before each text.
        for opening in ("", "\n", "a"):
            try:
                before = self._tokenizer.encode(opening)
                ids = self._tokenizer.encode(opening + plain)
            except UserError:
                break
            if ids[: len(before)] == before and self._spell(ids[len(before) :]) == data:
                return ids[len(before) :]
        return self._longest(data)

    def _beginning(self, data: bytes) -> list[int]:
        """Returns ids of the beginning of a long text, so that a step costs no more for it.

        The last ones are left out: with the rest of the text they might be others.
        """
        ids = self(data[:_LONGEST_FORCED].decode("utf-8", "ignore"))
        spelled = 0
        for count, token_id in enumerate(ids):
            spelled += len(self._tokenizer.token_bytes(token_id))
            if spelled > _LONGEST_FORCED - _CUT:
                return ids[:count]
        return ids

    def _spell(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._tokenizer.token_bytes(i) for i in ids)

    def _longest(self, data: bytes) -> list[int]:
        """Returns ids that spell `data`, each the longest piece that fits."""
        ids, longest = self._ids
        spelled, place = [], 0
        while place < len(data):
            for size in range(min(longest, len(data) - place), 0, -1):
                if (token_id := ids.get(data[place : place + size])) is not None:
                    spelled.append(token_id)
                    break
            else:
                break  # a byte without a piece: what comes after it cannot be written either
            place += size
        return spelled

    @cached_property
    def _ids(self) -> tuple[dict[bytes, int], int]:
        """Returns the ids of all pieces of text, and the bytes of the longest."""
        controls = set(self.special_token_ids)
        ids = {piece: i for i, piece in enumerate(self.tokens) if piece and i not in controls}
        return ids, max(map(len, ids), default=1)
