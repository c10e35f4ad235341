"""Malformed chats are refused by every tokenizer, by the message that is wrong."""

from typing import Any

import jaxtyping
import pytest

from mixtral_jax.errors import ChatError
from mixtral_jax.tokenization.tokenizer import Tokenizer
from tests.support.tokenizers import each, say, turns


@each
@pytest.mark.parametrize(
    ("chat", "complaint"),
    [
        ([], "the chat is empty"),
        (
            [say("robot", "x")],
            r"messages\[0\] has role 'robot': use one of system, user, assistant, tool",
        ),
        ([say("tool", "x")], r"messages\[0\] is the result of the call ''"),
        ([say("user", "x"), {"role": "user"}], r"messages\[1\] has no text"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\] has no text"),
        ([say("user", "ab\ud800")], r"messages\[0\] has half of a surrogate pair at character 2"),
    ],
)
def test_malformed_chats_are_refused(
    name: str, chat: list[Any], complaint: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    with pytest.raises(ChatError, match=complaint):
        all_tokenizers[name].chat(chat)


@pytest.mark.parametrize(
    ("chat", "complaint"),
    [
        ([say("user", "x"), "x"], r"messages\[1\] is a str: send role and content"),
        (say("user", "x"), "the chat is a dict: send a list of messages"),
        ("x", "the chat is a str: send a list of messages"),
        (None, "the chat is a NoneType: send a list of messages"),
    ],
)
@each
def test_what_is_no_list_of_messages_is_refused(
    name: str,
    chat: Any,
    complaint: str,
    all_tokenizers: dict[str, Tokenizer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ChatError, match=complaint):
        all_tokenizers[name].chat(chat)


@each
def test_only_an_assistants_words_can_be_continued(
    name: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    for last in (say("user", "hi"), say("assistant", " ")):
        with pytest.raises(ChatError, match="cannot be continued"):
            all_tokenizers[name].chat([*turns("hi"), last], continue_last=True)


@each
def test_text_that_is_not_unicode_is_refused(
    name: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    with pytest.raises(ChatError, match="surrogate pair at character 1"):
        all_tokenizers[name].encode("a\udfff")
