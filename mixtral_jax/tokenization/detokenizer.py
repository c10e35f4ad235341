"""Detokenizer: the text of a stream of token ids that is still growing.

A stream may stop in the middle of a character. `Detokenizer` keeps such a beginning back until the
rest arrives, or until it is clear that it never will.
"""

import codecs
from collections.abc import Callable


class Detokenizer:
    """Turns one stream of token ids into text, one token at a time. Make a new one per stream.

    The texts of all `push` calls and of `finish`, joined, equal `Vocabulary.decode` of the ids.
    """

    def __init__(
        self, token_bytes: Callable[[int], bytes], *, drop_first_space: bool = False
    ) -> None:
        """Begin a stream.

        Args:
            token_bytes: gives the bytes of an id (`Vocabulary.token_bytes`).
            drop_first_space: whether a space at the very beginning is taken off. Sentencepiece
                puts one before each text; the continuation of a prompt begins with a real one.
        """
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = drop_first_space

    def push(self, token_id: int) -> str:
        """Return the text that is certain once this token has come; "" inside a character.

        Bytes that are no UTF-8 become U+FFFD. Raises ValueError for a negative id.
        """
        data = self._token_bytes(token_id)
        if self._drop_space and data:
            data = data.removeprefix(b" ")
            self._drop_space = False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Return the rest when no more tokens come: U+FFFD if a character was cut, else ""."""
        return self._decoder.decode(b"", final=True)
