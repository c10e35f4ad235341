"""Walks under the mask of a schema at random: answers of a model that knows nothing."""

import json
from dataclasses import dataclass
from functools import cache

import numpy as np

from mixtral_jax.structure.matcher import Guide, Matcher
from mixtral_jax.structure.schema import Schema
from mixtral_jax.tokenization.tokenizer import Tokenizer
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer

CLOSING = {b'"', b"}", b"]", b",", b'"}', b'"]', b"}}", b'",'}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and its guide."""

    tokenizer: Tokenizer
    guide: Guide
    closing: np.ndarray

    @staticmethod
    def of(tokenizer: Tokenizer) -> "Vocabulary":
        pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        ends = set(tokenizer.eos_ids)
        closing = [piece in CLOSING or i in ends for i, piece in enumerate(pieces)]
        return Vocabulary(tokenizer, Guide(tokenizer, tokenizer.vocab_size), np.array(closing))

    @staticmethod
    @cache
    def of_bytes() -> "Vocabulary":
        return Vocabulary.of(ByteTokenizer())

    def matcher(self, schema: Schema) -> Matcher:
        """Compiles a schema with bounded white space. Raises StructureError."""
        value = json.loads(schema.text)
        options = {"x-guidance": {"whitespace_pattern": "[ \\n\\t\\r]{1,8}"}}
        whole = {**(value if isinstance(value, dict) else {}), **options}
        return self.guide.matcher(json.dumps({"grammars": [{"json_schema": whole}]}))

    def accepts(self, schema: Schema, text: str) -> bool:
        """Returns True if a text, byte for byte, is an answer under a schema (bytes only)."""
        inner = self.matcher(schema)
        consumed = inner._inner.try_consume_tokens(list(text.encode()))
        return consumed == len(text.encode()) and inner.may_end

    def walk(self, warm: Matcher, random: np.random.Generator, steps: int = 400) -> str | None:
        """Returns the text of a random answer, or None if it did not end within the steps.

        Ids that close something are favoured, or few answers would end.
        """
        matcher = warm.copy()
        mask = np.zeros(self.guide.words, np.int32)
        ids: list[int] = []
        for _ in range(steps):
            matcher.fill(mask)
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(self.closing)]
            allowed = np.flatnonzero(bits)
            favoured = allowed[self.closing[allowed]]
            choices = favoured if len(favoured) and random.random() < 0.35 else allowed
            ids.append(int(random.choice(choices)))
            matcher.consume(ids[-1:])
            if ids[-1] in self.tokenizer.eos_ids or matcher.has_ended:
                return b"".join(map(self.tokenizer.token_bytes, ids)).decode()
        return None
