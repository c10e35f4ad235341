"""Chats of the byte tokenizer, which can be read by eye."""

from pathlib import Path

from mixtral_jax.tokenization.tokenizer import files, load
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.support.tokenizers import say, turns


def test_byte_chats_are_read_by_eye() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("hi") == [256, 104, 105]
    assert tokenizer.encode("hi", with_special=False) == [104, 105]
    # bos, system a eos, user b eos, assistant
    chat = [say("system", "a"), say("user", "b")]
    assert tokenizer.chat(chat) == [256, 258, 97, 257, 259, 98, 257, 260]
    assert tokenizer.chat(chat, asks=False) == [256, 258, 97, 257, 259, 98, 257]
    assert tokenizer.vocab_size == 261
    assert tokenizer.eos_ids == {257}


def test_bytes_go_on_where_they_were_left() -> None:
    chat = [*turns("hi"), say("assistant", "yo")]
    assert ByteTokenizer().chat(chat, continue_last=True) == [*(256, 259, *b"hi", 257, 260, *b"yo")]


def test_a_folder_remembers_that_it_speaks_bytes(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    assert isinstance(load(tmp_path), ByteTokenizer)
    assert [path.name for path in files(tmp_path)] == ["byte_tokenizer.json"]
