"""Matchers: which tokens may follow in an answer that must match a grammar, by llguidance.

A grammar is text; `Guide` has the vocabulary that it is matched over. A matcher belongs to one
choice of one request: it takes in the tokens of the answer one by one, and writes a mask of the
tokens that may follow. Masks are bits: bit i of word w stands for the id 32 w + i.

https://github.com/guidance-ai/llguidance
"""

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask

from mixtral_jax.errors import StructureError
from mixtral_jax.tokenization.tokenizer import Tokenizer

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


class Guide:
    """A model's vocabulary as matchers read it. Thread-safe.

    Args:
        tokenizer: that of the model.
        width: V of the output layer, which may be more than the tokenizer's ids.
    """

    def __init__(self, tokenizer: Tokenizer, width: int) -> None:
        self.width = width
        self.words = -(-width // 32)
        self.vocabulary = LLTokenizer(TokenizerWrapper(_Pieces(tokenizer, width)))

    def matcher(self, grammar: str) -> "Matcher":
        """Returns a matcher at the beginning of an answer.

        Raises StructureError if the grammar is wrong, or so large that matching would be slow.
        """
        inner = LLMatcher(self.vocabulary, grammar, log_level=0, limits=LIMITS)
        matcher = Matcher(inner, self.words)
        matcher.check()
        return matcher


class Matcher:
    """Place of one choice in its grammar. Used by one thread at a time."""

    def __init__(self, inner: LLMatcher, words: int) -> None:
        self._inner = inner
        self._words = words

    @property
    def has_ended(self) -> bool:
        """True after the token that ended the answer."""
        return bool(self._inner.is_stopped())

    @property
    def may_end(self) -> bool:
        """True if the answer would be whole if it ended here."""
        return bool(self._inner.is_accepting())

    def copy(self) -> "Matcher":
        """Returns another matcher at the same place, which has all that this one has computed."""
        return Matcher(self._inner.deep_copy(), self._words)

    def check(self) -> None:
        """Raises StructureError if the grammar is wrong, or matching has run into a limit."""
        if self._inner.is_error():
            raise StructureError(str(self._inner.get_error()))

    def fill(self, mask: np.ndarray) -> None:
        """Writes the mask of the next token into `mask`: int32 of ceil(V / 32) words.

        Raises StructureError as `check` does; a matcher in error would else allow the end alone,
        and the answer would look whole.
        """
        fill_next_token_bitmask(self._inner, mask.reshape(1, -1), 0)
        self.check()

    def consume(self, token_ids: Sequence[int]) -> None:
        """Takes in tokens of the answer. Raises StructureError for one that may not follow."""
        if not self._inner.consume_tokens(list(token_ids)):
            self.check()
            raise StructureError("a token does not match the grammar")

    def forced(self) -> tuple[int, ...]:
        """Returns the tokens that must follow, as the tokenizer would write them; often none."""
        return tuple(self._inner.compute_ff_tokens())


class _Pieces:
    """A tokenizer in the form that llguidance asks for its vocabulary."""

    def __init__(self, tokenizer: Tokenizer, width: int) -> None:
        self._tokenizer = tokenizer
        size = tokenizer.vocab_size
        # Ids of a padded output layer are empty, and so in no mask.
        self.tokens = [tokenizer.token_bytes(i) if i < size else b"" for i in range(width)]
        self.special_token_ids = [i for i in range(size) if not self.tokens[i]]
        for i in self.special_token_ids:
            # A name of its own, or else a grammar that allows one control id allows all of them.
            self.tokens[i] = f"<control {i}>".encode()
        self.eos_token_id = min(tokenizer.eos_ids)
        self.bos_token_id: int | None = None
        # A piece before every text, so that the ids of `text` are those in the middle of a text.
        self._opening = tokenizer.encode("\n")

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        ids = self._tokenizer.encode("\n" + plain)
        return ids[len(self._opening) :]
