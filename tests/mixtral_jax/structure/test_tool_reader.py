"""Calls read from answers, token by token."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from mixtral_jax.structure.tool_reader import ToolReader
from mixtral_jax.tokenization.messages import ToolCall
from mixtral_jax.tokenization.tokenizer import Tokenizer
from mixtral_jax.tokenization.tool_form import Slot, ToolForm
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.mixtral_jax.structure.test_tool_grammar import called_ids
from tests.mixtral_jax.tokenization.test_tool_template import BLOCKS, made
from tests.support.tokenizers import MISTRAL_NAMES
from tests.support.tools import ROME, SUM, answered, asked

BYTES = ByteTokenizer()


def read(tokenizer: Tokenizer, ids: Iterable[int]) -> tuple[str, list[ToolCall], ToolReader]:
    reader = ToolReader(tokenizer, new_id=iter(f"made0000{n}" for n in range(9)).__next__)
    pairs = [reader.push(token_id) for token_id in ids]
    assert all(text == "" or "\ufffd" not in text for text, _ in pairs)
    pairs.append(reader.finish())
    return "".join(text for text, _ in pairs), [c for _, calls in pairs for c in calls], reader


@pytest.mark.parametrize("name", [*MISTRAL_NAMES, "bytes"])
def test_calls_are_read_as_they_were_written(
    name: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[name]
    form = tokenizer.tool_form
    calls = ["Rome"] if form.at_most_one else ["Rome", "sum"]
    ids = called_ids(tokenizer, *calls)
    text, read_calls, reader = read(tokenizer, [*ids, *tokenizer.eos_ids])
    expected = [ROME, SUM][: len(calls)]
    if not form.has_ids:
        expected = [{**call, "id": f"made0000{n}"} for n, call in enumerate(expected)]
    assert (text, read_calls) == ("", expected)


@pytest.mark.parametrize("name", [*MISTRAL_NAMES, "bytes"])
def test_a_cut_inside_of_a_call_gives_no_half_of_it(
    name: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[name]
    form = tokenizer.tool_form
    ids = called_ids(tokenizer, *(["Rome"] if form.at_most_one else ["Rome", "sum"]))
    begun = len(form.trigger_text) or 1
    for size in range(begun, len(ids)):
        text, calls, reader = read(tokenizer, ids[:size])
        assert text == ""
        assert [(c["name"], c["arguments"]) for c in calls] == [
            (c["name"], c["arguments"]) for c in [ROME, SUM][: len(calls)]
        ]


@pytest.mark.parametrize(
    ("ids", "text", "names"),
    [
        (b"Hello", "Hello", []),
        (b"<tool_call>", "<tool_call>", []),
        (b'see <tool_call>[{"name": "f", "arguments": {}}]</tool_call>', None, []),
        (b'<tool_call>[{"name": "f", "arguments": {}}]</tool_call>', "", ["f"]),
        (b'<tool_call>[{"name": "f", "arguments": {"a": "}]\\"}"}}]</tool_call>', "", ["f"]),
        (b'<tool_call>[{"name": "f", "arguments": []}]</tool_call>', None, []),
        (b'<tool_call>[{"name": "f", "arguments": {}}]</tool_call> ok', " ok", ["f"]),
        (b'<tool_call>[{"name": "f", "arguments": {}}, {"name": "g', "", ["f"]),
    ],
)
def test_what_is_not_in_the_form_is_text(ids: bytes, text: str | None, names: list[str]) -> None:
    heard, calls, _ = read(BYTES, ids)
    assert heard == (ids.decode() if text is None else text)
    assert [call["name"] for call in calls] == names


def test_a_text_that_mentions_the_control_token_is_text(
    all_tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = all_tokenizers["v3"]
    said = '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "123456789"}]'
    assert read(tokenizer, tokenizer.encode(said))[:2] == (said, [])


def test_text_comes_before_calls(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["v3"]
    ids = [*tokenizer.encode("I ask 你好")[1:], *called_ids(tokenizer, "Rome")]
    assert read(tokenizer, ids)[:2] == ("I ask 你好", [ROME])


def test_calls_of_one_answer_have_ids_of_their_own(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["v3"]
    ids = called_ids(tokenizer, "Rome", "Rome")
    _, calls, _ = read(tokenizer, ids)
    assert [call["id"] for call in calls] == ["abcDEF123", "made00000"]


@pytest.mark.parametrize("tokens", [(), ("<tool_call>", "</tool_call>")], ids=["text", "tokens"])
def test_calls_of_a_template_are_read_behind_text(tokens: tuple[str, ...], tmp_path: Path) -> None:
    tokenizer = made(tmp_path, BLOCKS, *tokens)
    call = {"name": "add", "arguments": '{"a": 1, "b": 2}'}
    calls = [{"id": "made00000", **call}, {"id": "made00001", **call}]
    prompt = tokenizer.chat(asked(SUM)[:1])
    chat = answered([{**SUM, **call}, {**ROME, **call}], "1", "2")
    written = tokenizer.chat(chat)[len(prompt) :]
    written = written[: written.index(min(tokenizer.eos_ids))]
    assert read(tokenizer, written)[:2] == ("", calls)
    before = tokenizer.encode("I <tool>look</tool_ca <tool_call\n")
    text, read_calls, _ = read(tokenizer, [*before, *written])
    assert (text, read_calls) == ("I <tool>look</tool_ca <tool_call\n", calls)
    text, read_calls, _ = read(tokenizer, [*before, *written, *before])
    assert (text, read_calls) == (2 * "I <tool>look</tool_ca <tool_call\n", calls)
    assert read(tokenizer, before)[:2] == ("I <tool>look</tool_ca <tool_call\n", [])


def test_where_no_text_precedes_calls_a_string_of_json_that_looks_like_one_is_text() -> None:
    class Functions(ByteTokenizer):
        tool_form = ToolForm(("<function=", Slot.NAME, ">", Slot.ARGUMENTS), text_may_precede=True)

    tokenizer = Functions()
    ids = tokenizer.encode('{"a": "<function=f>{}"}')[1:]
    for may_precede, expected in ((True, '{"a": "'), (False, '{"a": "<function=f>{}"}')):
        reader = ToolReader(tokenizer, text_may_precede=may_precede)
        pairs = [*map(reader.push, ids), reader.finish()]
        assert "".join(text for text, _ in pairs).startswith(expected)
        assert any(calls for _, calls in pairs) is may_precede
    reader = ToolReader(tokenizer, text_may_precede=False)
    assert any(calls for _, calls in map(reader.push, tokenizer.encode("<function=f>{}")[1:]))
