"""Streams of ids become text without half a character in between."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax.tokenization.tokenizer import Tokenizer
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.support.tokenizers import TEXTS, each


@each
def test_no_push_ever_holds_half_a_character(
    name: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[name]
    for text in TEXTS:
        detokenizer = tokenizer.detokenizer()
        parts = [detokenizer.push(token_id) for token_id in tokenizer.encode(text)]
        assert not any("\ufffd" in part for part in parts)
        assert "".join(parts) + detokenizer.finish() == text


@each
@settings(deadline=None)  # a busy machine is no wrong answer
@given(data=st.data())
def test_a_stream_joined_is_what_decode_says(
    name: str, data: st.DataObject, all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[name]
    # The low ids are bytes and control tokens in all of them: draw those more often.
    token_ids = st.integers(0, 1100) | st.integers(0, tokenizer.vocab_size + 5)
    ids = data.draw(st.lists(token_ids, max_size=12))
    detokenizer = tokenizer.detokenizer()
    joined = "".join([detokenizer.push(token_id) for token_id in ids]) + detokenizer.finish()
    assert joined == tokenizer.decode(ids)
    joined.encode()  # proper text, whatever the bytes


@each
def test_a_continuation_keeps_its_first_space(
    name: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[name]
    ids = tokenizer.encode("hello world")
    for cut in range(2, len(ids)):  # after bos, where there is one, and the first token
        detokenizer = tokenizer.detokenizer(continues=True)
        rest = "".join([detokenizer.push(token_id) for token_id in ids[cut:]])
        assert tokenizer.decode(ids[:cut]) + rest == "hello world"


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    # e2 82 begins a three-byte character, which "a" cuts short; e2 82 ac is the euro sign.
    detokenizer = ByteTokenizer().detokenizer()
    assert [detokenizer.push(byte) for byte in (0xE2, 0x82, ord("a"))] == ["", "", "\ufffda"]
    assert [detokenizer.push(byte) for byte in (0xE2, 0x82, 0xAC)] == ["", "", "€"]
    assert [detokenizer.push(byte) for byte in (0xFF, 0xE2)] == ["\ufffd", ""]
    assert detokenizer.finish() == "\ufffd"
