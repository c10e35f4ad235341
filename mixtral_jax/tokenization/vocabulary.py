"""Vocabulary: the bytes that each token id stands for, and the text that ids spell.

A token stands for bytes, not for characters: both families of tokenizer (byte-level BPE, and
sentencepiece with byte fallback) cut rare characters into several tokens. A vocabulary is therefore
a table from id to bytes, and text is those bytes read as UTF-8.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache

from mixtral_jax.tokenization.detokenizer import Detokenizer

_SPM_SPACE = "\u2581"  # sentencepiece writes a space as this character
_SPM_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte that has no piece of its own


class Vocabulary:
    """The reading half of a tokenizer: the bytes of every id, and which ids end an answer."""

    def __init__(
        self, pieces: Sequence[bytes], eos_ids: Iterable[int], *, dummy_space: bool = False
    ) -> None:
        """Take the bytes of ids 0, 1, 2...; control tokens are b"".

        Args:
            pieces: bytes per id.
            eos_ids: the ids that end generation.
            dummy_space: whether encoding puts a space before the text, which decoding removes.
        """
        self._pieces = tuple(pieces)
        self.eos_ids = frozenset(eos_ids)
        self.dummy_space = dummy_space

    @property
    def vocab_size(self) -> int:
        """Number of ids. The output layer of a model may be padded to more."""
        return len(self._pieces)

    @property
    def required_vocab_size(self) -> int:
        """Number of ids that a model must have: those that text, chats or an answer's end need.

        It may be smaller than `vocab_size`: ids that nothing can write need no embedding.
        """
        return self.vocab_size

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to the text; b"" for control tokens.

        Ids past the vocabulary, which a padded output layer can yield, add nothing either.
        Raises ValueError for a negative id.
        """
        if token_id < 0:
            raise ValueError(f"token ids start at 0, got {token_id}")
        return self._pieces[token_id] if token_id < len(self._pieces) else b""

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of a list of ids, without control tokens.

        Bytes that are no UTF-8 become U+FFFD, one for each maximal wrong part (the Unicode
        standard's recommendation; sentencepiece itself writes one for each byte).
        """
        data = b"".join(map(self.token_bytes, token_ids))
        if self.dummy_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def detokenizer(self, *, continues: bool = False) -> Detokenizer:
        """Begin a stream; `continues` says that its text continues a prompt's."""
        return Detokenizer(self.token_bytes, drop_first_space=self.dummy_space and not continues)


def spm_bytes(piece: str) -> bytes:
    """Return the bytes of a sentencepiece piece: "\u2581the" is b" the", "<0xE2>" is b"\\xe2"."""
    if byte := _SPM_BYTE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    return piece.replace(_SPM_SPACE, " ").encode()


def byte_level_bytes(piece: str) -> bytes:
    """Return the bytes of a byte-level BPE piece, which spells each byte as one visible character.

    An added token is written as it is: a piece with any other character stands for itself.
    """
    try:
        return bytes(_byte_of_character()[character] for character in piece)
    except KeyError:
        return piece.encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """Return the byte that each character stands for in GPT-2's spelling.

    Visible characters of Latin-1 stand for themselves. The other bytes have the characters from
    U+0100 on, in order; a space is U+0120.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + place): byte for place, byte in enumerate(hidden)
    }
