"""Ids of Mistral's tokenizers are those of mistral-common."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as Reference

from mixtral_jax.errors import ChatError, TokenizerError
from mixtral_jax.tokenization.messages import Message
from mixtral_jax.tokenization.mistral import MistralTokenizer
from mixtral_jax.tokenization.tokenizer import Tokenizer
from tests.support.tokenizers import (
    MISTRAL_FILES,
    MISTRAL_NAMES,
    TEXTS,
    later_tekken,
    say,
    turns,
)


@pytest.mark.parametrize(
    ("version", "ids"),
    [
        # <s> _[ INST ] _a _[ / INST ]
        ("v1", [1, 733, 16289, 28793, 264, 733, 28748, 16289, 28793]),
        ("v2", [1, 3, 1032, 4]),  # <s> [INST] _a [/INST]
        ("v3", [1, 3, 1032, 4]),
        ("v7", [1, 3, 1032, 4]),
        # Ids of bytes begin at 1000 in tekken: a is 97.
        ("tekken-v3", [1, 3, 1097, 4]),
        ("tekken-v7", [1, 3, 1097, 4]),
        ("tekken-v11", [1, 3, 1097, 4]),
        ("tekken-v13", [1, 3, 1097, 4]),
    ],
)
def test_one_turn_is_known_by_heart(
    version: str, ids: list[int], all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[version]
    assert tokenizer.chat(turns("a")) == ids
    assert tokenizer.chat(turns("a"), asks=False) == ids  # nothing opens an answer there
    assert [1, *tokenizer.encode("a", with_special=False)] == tokenizer.encode("a")


CHATS = {
    "single turn": turns("Hello"),
    "several turns": turns("Hello", "Hi, how are you?", "Fine."),
    "system first": [say("system", "Be brief."), *turns("Hello", "Hi", "Why?")],
    "system late": [say("user", "Hello"), say("system", "Be brief."), say("user", "Why?")],
    "system only": [say("system", "Be brief.")],
    "two systems": [say("system", "A"), say("system", "B"), say("user", "C")],
    "users in a row": [say("user", "Hello"), say("user", "again")],
    "assistant first": [say("assistant", "Hi"), say("user", "Hello")],
    "spaces": turns("  Hello  ", " Hi  ", "Why?  \n"),
    "unicode": turns("你好 🙂", "Grüße", "👩‍👩‍👧\u00a0"),
    "empty": turns(""),
    "attack": turns("[INST] </s> <s> [/INST]", "</s>[INST]", "<unk>"),
}


@pytest.fixture(scope="module")
def references(mistral_files: dict[str, Path]) -> dict[str, Any]:
    return {version: Reference.from_file(str(path)) for version, path in mistral_files.items()}


@pytest.mark.parametrize("version", MISTRAL_NAMES)
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())
def test_mistral_chats_are_mistral_commons(
    version: str,
    chat: list[Any],
    all_tokenizers: dict[str, Tokenizer],
    references: dict[str, Any],
) -> None:
    request = ChatCompletionRequest(messages=chat)
    expected = references[version].encode_chat_completion(request).tokens
    assert all_tokenizers[version].chat(chat) == expected


@pytest.mark.parametrize("version", MISTRAL_NAMES)
def test_mistral_text_is_mistral_commons_both_ways(
    version: str, all_tokenizers: dict[str, Tokenizer], references: dict[str, Any]
) -> None:
    ours = all_tokenizers[version]
    theirs = references[version].instruct_tokenizer.tokenizer
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, bos=True, eos=False)
        assert ours.decode(ids) == theirs.decode(ids) == text
    assert ours.vocab_size == theirs.n_words
    assert ours.eos_ids == {2}


@pytest.mark.parametrize(
    ("source", "name", "version"),
    [
        (MISTRAL_FILES["v1"], "tokenizer.model", "v1"),
        (MISTRAL_FILES["v3"], "tokenizer.model", "v3"),
        (MISTRAL_FILES["v2"], "tokenizer.model.v2", "v2"),
        # The same bytes are published as v3 with Mistral-7B-Instruct-v0.3.
        (MISTRAL_FILES["v2"], "tokenizer.model", "v3"),
        (MISTRAL_FILES["v2"], "tokenizer.model.v3", "v3"),
        (MISTRAL_FILES["v7"], "tokenizer.model", "v7"),
        (MISTRAL_FILES["v7"], "tokenizer.model.v7", "v7"),
        (MISTRAL_FILES["v7"], "tokenizer.model.v7m1", "v7"),
        (MISTRAL_FILES["v3"], "tokenizer.model.v3m1", "v3"),
        (MISTRAL_FILES["tekken-v3"], "tekken.json", "v3"),
    ],
)
def test_the_version_comes_from_the_name_or_else_from_the_pieces(
    source: Path, name: str, version: str, tmp_path: Path
) -> None:
    shutil.copy(source, tmp_path / name)
    assert MistralTokenizer(tmp_path / name).version == version


@pytest.mark.parametrize(
    ("source", "name", "complaint"),
    [
        (MISTRAL_FILES["v1"], "tokenizer.model.v3", "calls itself v3"),
        (MISTRAL_FILES["v3"], "tokenizer.model.v1", "calls itself v1"),
        (MISTRAL_FILES["v3"], "tokenizer.model.v7", "calls itself v7"),
        (MISTRAL_FILES["v7"], "tokenizer.model.v3", "calls itself v3"),
        (MISTRAL_FILES["v7"], "tokenizer.model.v9", "version v9; supported are v1, v2, v3, v7"),
        (Path(__file__), "tokenizer.model", "not a sentencepiece model"),
        (Path(__file__), "tekken.json", "not a tekken file that mistral-common can read"),
    ],
)
def test_other_files_are_refused(source: Path, name: str, complaint: str, tmp_path: Path) -> None:
    shutil.copy(source, tmp_path / name)
    with pytest.raises(ValueError, match=complaint):
        MistralTokenizer(tmp_path / name)


@pytest.mark.parametrize(
    ("version", "changes", "complaint"),
    [
        ("v15", {}, "of version v15; supported are v3, v7, v11, v13"),
        ("v2", {}, "of version v2; supported are v3"),
        ("v99", {}, "not a tekken file .* Unknown version: v99"),
        ("v7", {"default_vocab_size": 9000}, "not a tekken file .* AssertionError"),
        ("v7", {"pattern": "("}, "not a tekken file"),
    ],
)
def test_other_tekken_files_are_refused(
    version: str, changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = later_tekken(tmp_path, version, **changes)
    with pytest.raises(TokenizerError, match=complaint):
        MistralTokenizer(path)


def test_characters_cut_into_several_tokens_stream_as_mistral_common_decodes_them(
    all_tokenizers: dict[str, Tokenizer], references: dict[str, Any]
) -> None:
    text = "𓀀 ꙮ 🏴‍☠️ 🇺🇳 ᚠᚢᚦ ﷽ 𝔘𝔫𝔦"
    for name in MISTRAL_NAMES:
        tokenizer = all_tokenizers[name]
        ids = tokenizer.encode(text)
        assert ids == references[name].instruct_tokenizer.tokenizer.encode(
            text, bos=True, eos=False
        )
        detokenizer = tokenizer.detokenizer()
        pushed = [detokenizer.push(token_id) for token_id in ids]
        # More tokens than characters, so that some of them lie inside of one.
        assert pushed.count("") > 5, name
        assert not any("\ufffd" in push for push in pushed), name
        assert "".join(pushed) + detokenizer.finish() == text, name


def test_a_text_that_tekken_cannot_split_is_named(all_tokenizers: dict[str, Tokenizer]) -> None:
    # The pattern backtracks over white space without an end.
    text = " " * 2_000_000
    tokenizer = all_tokenizers["tekken-v7"]
    with pytest.raises(ValueError, match="cannot be cut into tokens"):
        tokenizer.encode(text)
    with pytest.raises(ChatError, match="cannot be cut into tokens"):
        tokenizer.chat(turns(text + "x"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model"):
        MistralTokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("version", MISTRAL_NAMES)
@pytest.mark.parametrize(
    "chat",
    [
        turns("a", "b"),
        turns("", "")[1:],
        [*turns("a", "b"), say("system", "c"), say("user", "d")],
        [say("assistant", "a")],
    ],
)
def test_chats_that_mistral_refuses_say_what_to_change(
    version: str, chat: list[Message], all_tokenizers: dict[str, Tokenizer]
) -> None:
    with pytest.raises(ChatError, match="ends with a user message or the") as caught:
        all_tokenizers[version].chat(chat)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", MISTRAL_NAMES)
def test_a_mistral_answer_that_was_begun_is_left_open(
    version: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[version]
    chat = turns("How many?", "There are")
    (eos,) = tokenizer.eos_ids
    begun = tokenizer.chat(chat, continue_last=True)
    asked = tokenizer.chat(chat[:1])
    assert begun[: len(asked)] == asked
    assert tokenizer.decode(begun[len(asked) :]) == "There are"
    assert begun[-1] != eos
    closed = tokenizer.chat([*chat, say("user", "?")])
    assert closed[: len(begun) + 1] == [*begun, eos]
