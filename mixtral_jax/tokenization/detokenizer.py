"""From token ids back to text: how each vocabulary spells its tokens, and text that grows.

A token is worth bytes, not characters: both families of tokenizer (byte-level BPE and
sentencepiece with byte fallback) cut rare characters into several tokens. So a vocabulary is
turned once into a table, id -> bytes, and text is what those bytes say in UTF-8. A stream of
tokens may stop in the middle of a character; `Detokenizer` keeps such a beginning back until the
rest arrives, or until it is clear that it never will.

Imports nothing of ours. `mixtral_jax.tokenization.tokenizer` goes the other way, from text to ids.
"""

import codecs
import re
from collections.abc import Iterable, Sequence
from functools import cache

_SPM_SPACE = "\u2581"  # sentencepiece writes a space as this character
_SPM_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # and a byte that has no piece of its own so


class Detokenizer:
    """Turns one stream of token ids into text, a token at a time. One per stream.

    The texts of all `push` calls and of `finish`, joined, are what `decode` says of the ids.
    """

    def __init__(self, vocabulary: "Vocabulary", *, continues: bool = False) -> None:
        """Begin a stream.

        Args:
            vocabulary: what each id is worth.
            continues: whether the stream carries on a text that came before (the prompt of a
                completion). A sentencepiece text opens with a space that nobody wrote, which is
                taken off; in a continuation the first space is a real one and stays.
        """
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_dummy_space = vocabulary.dummy_space and not continues

    def push(self, token_id: int) -> str:
        """The text that is certain once this token has come; "" inside a character.

        Bytes that are no UTF-8 become U+FFFD. Raises ValueError for a negative id.
        """
        data = self._vocabulary.token_bytes(token_id)
        if self._at_dummy_space and data:
            data = data.removeprefix(b" ")
            self._at_dummy_space = False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left when no more tokens come: U+FFFD if a character was cut, else ""."""
        return self._decoder.decode(b"", final=True)


class Vocabulary:
    """The reading half of a tokenizer: the bytes of every id, and which ids end an answer."""

    def __init__(
        self, pieces: Sequence[bytes], eos_ids: Iterable[int], *, dummy_space: bool = False
    ) -> None:
        """Take the bytes of ids 0, 1, 2...; control tokens are b"".

        Args:
            pieces: bytes per id.
            eos_ids: the ids that end generation.
            dummy_space: whether encoding puts a space before the text, to be taken off again.
        """
        self._pieces = tuple(pieces)
        self.eos_ids = frozenset(eos_ids)
        self.dummy_space = dummy_space

    @property
    def vocab_size(self) -> int:
        """How many ids there are; a model's output layer may be padded beyond."""
        return len(self._pieces)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the text: b"" for control tokens.

        Ids past the vocabulary, which a padded output layer can yield, add nothing either.
        Raises ValueError for a negative id.
        """
        if token_id < 0:
            raise ValueError(f"token ids start at 0, got {token_id}")
        return self._pieces[token_id] if token_id < len(self._pieces) else b""

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of a whole list of ids, control tokens left out.

        Bytes that are no UTF-8 become U+FFFD, one for each maximal wrong part (the Unicode
        standard's recommendation; sentencepiece itself writes one for each byte).
        """
        data = b"".join(map(self.token_bytes, token_ids))
        if self.dummy_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def detokenizer(self, *, continues: bool = False) -> Detokenizer:
        """A fresh `Detokenizer`; `continues` for the continuation of a prompt's text."""
        return Detokenizer(self, continues=continues)


def spm_bytes(piece: str) -> bytes:
    """The bytes of a sentencepiece piece: "\u2581the" is b" the", "<0xE2>" is b"\\xe2"."""
    if byte := _SPM_BYTE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    return piece.replace(_SPM_SPACE, " ").encode()


def byte_level_bytes(piece: str) -> bytes:
    """The bytes of a byte-level BPE piece, which spells each byte as one visible character.

    An added token is written as it is: a piece with any other character stands for itself.
    """
    try:
        return bytes(_byte_of_character()[character] for character in piece)
    except KeyError:
        return piece.encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: Latin-1's visible characters stand for themselves, and the other
    bytes take, in order, the characters from U+0100 on (so a space is U+0120)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + place): byte for place, byte in enumerate(hidden)
    }
