"""Ids to bytes, for every tokenizer."""

import pytest

from mixtral_jax.tokenization.tokenizer import Tokenizer
from tests.support.tokenizers import TEXTS, each


@each
def test_text_comes_back_as_it_was(name: str, all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers[name]
    for text in [*TEXTS, "</s> <|im_end|>"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@each
def test_ids_beyond_the_vocabulary_add_nothing(
    name: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[name]
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    with pytest.raises(ValueError, match="start at 0, got -1"):
        tokenizer.token_bytes(-1)
