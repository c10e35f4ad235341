"""Targets of chats and texts, with answers that one can check by hand on the toy of bytes.

Ids of the toy: bytes below 256, then <s> 256, </s> 257, and roles: system 258, user 259,
assistant 260.
"""

from pathlib import Path

import pytest

from mixtral_jax.errors import ChatError
from mixtral_jax.tokenization.messages import Message, Tool
from mixtral_jax.tokenization.tokenizer import Tokenizer, load
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from mixtral_jax.training.example import Example
from mixtral_jax.training.rendering import ending_id, examples_of
from mixtral_jax.training.rows import Chat, Completion, DataError
from tests.mixtral_jax.tokenization.test_tool_template import made
from tests.support.tokenizers import CHATML, MISTRAL_FILES, SPECS, say, turns, write
from tests.support.tools import ROME, SUM, asked, result


def targets(example: Example) -> list[int]:
    return [int(i) for i, weight in zip(example.ids, example.weights, strict=True) if weight]


def chat_of(messages: list[Message], *unlearnt: int, tools: tuple[Tool, ...] = ()) -> Chat:
    learnt = [m["role"] == "assistant" and i not in unlearnt for i, m in enumerate(messages)]
    return Chat(messages, learnt, tools)


def mistral(folder: Path, version: str) -> Tokenizer:
    (folder / MISTRAL_FILES[version].name).symlink_to(MISTRAL_FILES[version])
    return load(folder)


def test_answers_and_their_ends_are_targets() -> None:
    (example,) = examples_of(chat_of(turns("q", "a", "r", "b")), ByteTokenizer())
    ids = [256, 259, ord("q"), 257, 260, ord("a"), 257, 259, ord("r"), 257, 260, ord("b"), 257]
    assert example.ids.tolist() == ids
    assert example.weights.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]


def test_an_answer_of_weight_0_is_only_read() -> None:
    (example,) = examples_of(chat_of(turns("q", "a", "r", "b"), 1), ByteTokenizer())
    assert targets(example) == [ord("b"), 257]
    (example,) = examples_of(chat_of(turns("q", "a", "r", "b"), 3), ByteTokenizer())
    assert example.ids.tolist() == [256, 259, ord("q"), 257, 260, ord("a"), 257]


def test_what_a_template_writes_behind_an_end_is_no_target(tmp_path: Path) -> None:
    tokenizer = load(write(tmp_path / "a", SPECS["byte-level"], CHATML))
    (example,) = examples_of(chat_of(turns("q", "a", "r", "b")), tokenizer)
    text = tokenizer.decode(targets(example))
    assert text == "ab"
    assert [i for i in targets(example) if i in tokenizer.eos_ids] == [2, 2]
    assert example.ids[-1] == 2  # not the line break behind it


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_a_system_message_that_moves_gives_each_answer_its_own_example(
    version: str, tmp_path: Path
) -> None:
    tokenizer = mistral(tmp_path, version)
    plain = examples_of(chat_of(turns("q", "a", "r", "b")), tokenizer)
    assert len(plain) == 1
    chat = [say("system", "s"), *turns("q", "a", "r", "b")]
    first, second = examples_of(chat_of(chat), tokenizer)
    assert tokenizer.decode(targets(first)) == "a"
    assert tokenizer.decode(targets(second)) == "b"
    asked_first = tokenizer.chat(chat[:2])
    assert first.ids[: len(asked_first)].tolist() == asked_first
    asked_second = tokenizer.chat(chat[:4])
    assert second.ids[: len(asked_second)].tolist() == asked_second


def test_a_format_of_single_calls_takes_them_one_after_the_other(tmp_path: Path) -> None:
    tokenizer = mistral(tmp_path, "v2")
    chat = [*asked(ROME, SUM), result("123456789", "-0.5"), result("abcDEF123", "warm")]
    (example,) = examples_of(chat_of([*chat, say("assistant", "b")]), tokenizer)
    ends = [i for i in targets(example) if i in tokenizer.eos_ids]
    assert len(ends) == 3  # a call, a call and the answer
    with pytest.raises(DataError, match="not a result for each"):
        examples_of(chat_of(asked(ROME, SUM)), tokenizer)


def test_text_beside_calls_that_a_format_leaves_out_is_refused(tmp_path: Path) -> None:
    chat = asked(ROME, text="Let me look.")
    with pytest.raises(DataError, match="has text beside calls in message 1"):
        examples_of(chat_of(chat), mistral(tmp_path, "v3"))
    (tmp_path / "v7").mkdir()
    (example,) = examples_of(chat_of(chat), mistral(tmp_path / "v7", "v7"))
    assert targets(example)


@pytest.mark.parametrize("asking", ["assistant\n<think></think>", ""])
def test_a_template_that_asks_otherwise_than_it_keeps_answers_is_refused(
    asking: str, tmp_path: Path
) -> None:
    template = CHATML.replace("assistant\n{% endif", asking + "{% endif")
    tokenizer = load(write(tmp_path / "a", SPECS["byte-level"], template))
    reason = "cannot be learnt exactly|message 1 that this model's format changes"
    with pytest.raises(DataError, match=reason):
        examples_of(chat_of(turns("q", "a")), tokenizer)


def test_an_answer_that_joins_the_prompts_last_token_is_refused(tmp_path: Path) -> None:
    tokenizer = made(tmp_path / "a", CHATML, "\n\n")  # two line breaks are a token
    assert len(examples_of(chat_of(turns("q", "a")), tokenizer)) == 1
    with pytest.raises(DataError, match="cannot be learnt exactly: with the answer of message 1"):
        examples_of(chat_of(turns("q", "\na")), tokenizer)


def test_a_template_without_an_end_is_refused(tmp_path: Path) -> None:
    endless = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = load(write(tmp_path / "a", SPECS["byte-level"], endless))
    with pytest.raises(DataError, match="would never learn to end"):
        examples_of(chat_of(turns("q", "a")), tokenizer)


def test_an_answer_to_nothing_and_one_after_another_are_refused(tmp_path: Path) -> None:
    tokenizer = mistral(tmp_path, "v3")
    with pytest.raises(DataError, match="answers nothing"):
        examples_of(chat_of([say("assistant", "a")]), tokenizer)
    with pytest.raises(ChatError, match="ends with an assistant's message"):
        examples_of(chat_of([*turns("q", "a"), say("assistant", "b")]), tokenizer)


def test_text_is_learnt_behind_the_prompt() -> None:
    tokenizer = ByteTokenizer()
    example = examples_of(Completion("ab", "c"), tokenizer)[0]
    assert example.ids.tolist() == [256, ord("a"), ord("b"), ord("c"), 257]
    assert example.weights.tolist() == [0, 0, 0, 1, 1]
    whole = examples_of(Completion("", "ab"), tokenizer)[0]
    assert whole.weights.tolist() == [0, 1, 1, 1]


def test_a_completion_that_changes_the_prompts_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = mistral(tmp_path, "v3")
    with pytest.raises(DataError, match="let the prompt end where a word ends"):
        examples_of(Completion("The capital is Par", "is."), tokenizer)
    (example,) = examples_of(Completion("The capital is", " Paris."), tokenizer)
    assert tokenizer.decode(targets(example)).strip() == "Paris."


def test_the_end_of_text_is_that_of_answers_where_there_are_several(tmp_path: Path) -> None:
    generation = {"eos_token_id": [0, 2]}
    tokenizer = load(write(tmp_path / "a", SPECS["byte-level"], CHATML, generation=generation))
    assert tokenizer.eos_ids == {0, 2}
    assert ending_id(tokenizer) == 2
