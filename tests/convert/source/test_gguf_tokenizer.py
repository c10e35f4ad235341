"""A GGUF file's vocabulary becomes files that `load` reads, with the ids llama.cpp would give."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from convert.source.gguf_tokenizer import write
from mixtral_jax.tokenization.messages import Message
from mixtral_jax.tokenization.tokenizer import Tokenizer, load

# Ids 0 to 2 are control tokens, 3 is text that is never cut, 4 to 259 single bytes, then merges.
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*CONTROLS, "<think>", *BYTES, "12", "Ġ1", "Ġa", "ab"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
FIELDS: dict[str, object] = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3, 4] + [1] * (len(TOKENS) - 4),
    "tokenizer.ggml.merges": ["1 2", "Ġ 1", "Ġ a", "a b"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": TEMPLATE,
}


def written(folder: Path, changes: Mapping[str, object] | None = None) -> Tokenizer:
    """FIELDS with changes, written and loaded; None takes a field away."""
    fields = FIELDS | dict(changes or {})
    write({name: value for name, value in fields.items() if value is not None}, folder)
    return load(folder)


def ids(*tokens: str) -> list[int]:
    return [TOKENS.index(token) for token in tokens]


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("smollm", "a12 12", ["a", "1", "2", "Ġ", "1", "2"]),  # every digit on its own
        ("gpt-2", "a12 12", ["a", "12", "Ġ", "12"]),  # "1 2" was learnt before "Ġ 1"
        ("gpt-2", "a 1", ["a", "Ġ1"]),
        ("smollm", "b ab", ["b", "Ġa", "b"]),  # "Ġ a" was learnt before "a b"
        ("gpt-2", "b ab", ["b", "Ġa", "b"]),
        ("smollm", "½ é", ["Â", "½", "Ġ", "Ã", "©"]),
        ("smollm", "<think>a<|im_end|", ["<think>", "a", *"<|im_end|"]),
    ],
)
def test_text_is_cut_as_the_name_of_the_pre_tokenizer_says(
    pre: str, text: str, tokens: list[str], tmp_path: Path
) -> None:
    tokenizer = written(tmp_path, {"tokenizer.ggml.pre": pre})
    assert tokenizer.encode(text) == ids(*tokens)
    assert tokenizer.decode(ids(*tokens)) == text


def test_chats_use_the_template_and_the_control_tokens(tmp_path: Path) -> None:
    tokenizer = written(tmp_path)
    chat = tokenizer.chat([{"role": "user", "content": "ab"}])
    assert chat == ids("<|im_start|>", "ab", "<|im_end|>", "<|im_start|>")
    assert tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.eos_ids == {2}
    assert [tokenizer.token_bytes(i) for i in range(4)] == [b"", b"", b"", b"<think>"]


def test_without_a_template_there_is_plain_text_only(tmp_path: Path) -> None:
    tokenizer = written(tmp_path, {"tokenizer.chat_template": None})
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "ab"}])


def test_bos_opens_plain_text_if_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = written(tmp_path, {"tokenizer.ggml.add_bos_token": True})
    assert tokenizer.encode("ab") == ids("<|im_start|>", "ab")


def test_a_space_comes_first_if_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = written(tmp_path, {"tokenizer.ggml.add_space_prefix": True})
    assert tokenizer.encode("a") == ids("Ġa")


def test_ends_of_turns_end_an_answer_too(tmp_path: Path) -> None:
    tokenizer = written(tmp_path, {"tokenizer.ggml.eot_token_id": 0})
    assert tokenizer.eos_ids == {0, 2}
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [0, 2]}


def test_a_byte_without_a_token_is_left_out(tmp_path: Path) -> None:
    tokens = [token if token != "z" else "zz" for token in TOKENS]
    tokenizer = written(tmp_path, {"tokenizer.ggml.tokens": tokens})
    assert tokenizer.encode("azc") == ids("a", "c")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tokenizer.ggml.model": "llama"}, "original tokenizer.model beside it"),
        ({"tokenizer.ggml.model": "bert"}, "'bert' where only byte-level BPE"),
        ({"tokenizer.ggml.model": None}, "None where only byte-level BPE"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "'llama-bpe'.*only 'gpt-2' and 'smollm'"),
        ({"tokenizer.ggml.pre": "default"}, "'default'.*original tokenizer.json beside it"),
        ({"tokenizer.ggml.pre": None}, "names the pre-tokenizer None"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": [1]}, "one entry for each token"),
        ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "a"]}, "the same token twice"),
        ({"tokenizer.ggml.eos_token_id": None}, "no answer would end"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id is 999, of 264 tokens"),
    ],
)
def test_what_would_give_wrong_ids_is_refused(
    changes: Mapping[str, object], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=complaint):
        written(tmp_path, changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_real_file_gives_the_ids_of_transformers(smollm2_gguf: Path, tmp_path: Path) -> None:
    import gguf
    import transformers

    fields = gguf.GGUFReader(smollm2_gguf).fields
    write({name: field.contents() for name, field in fields.items()}, tmp_path)
    tokenizer = load(tmp_path)
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_ids == {2}

    reference = transformers.AutoTokenizer.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name
    )
    for text in (
        "Hello world",
        "  leading and trailing  ",
        "def f(x):\n\tif x:\n        return x + 1\n\n\n",
        "12345 3.14, 1,000 and a1b2",
        "It's what we'll DON'T",
        "Grüße “señor” 你好，世界 こんにちは",
        "🙂 👩‍👩‍👧 🇫🇷",
        "a\u00a0b\r\n\u2003",
    ):
        expected = reference(text)["input_ids"]
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected) == reference.decode(expected) == text
        chat: list[Message] = [{"role": "user", "content": text}]
        assert tokenizer.chat(chat) == reference.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    # Numbers beyond ASCII are digits as well, which transformers' reading of GGUF does not know:
    # the space before one stays alone, and so does each Arabic digit.
    pieces = [tokenizer.token_bytes(i).decode() for i in tokenizer.encode("x 5 ½")]
    assert pieces == ["x", " ", "5", " ", "½"]
