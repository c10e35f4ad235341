"""Special tokens and ends of answers are taken from whichever file has them."""

import json
from pathlib import Path

import pytest

from mixtral_jax.errors import TokenizerError
from mixtral_jax.tokenization.special_tokens import (
    eos_ids,
    extra_special_tokens,
    named_tokens,
    read_object,
    template_source,
)
from mixtral_jax.tokenization.tokenizer import copy, load
from tests.support.tokenizers import CHATML, MISTRAL_FILES, turns, write


def put(folder: Path, name: str, content: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, 2, {2}),
        (None, [0, 2], {0, 2}),
        ({}, [0, 2], {0, 2}),  # a generation_config.json that says nothing about the end
        ({"eos_token_id": None}, 0, {0}),
        ({"eos_token_id": []}, 0, {0}),
        ({"eos_token_id": 1}, 0, {1}),
        ({"eos_token_id": [1]}, None, {1}),
        (None, None, set()),
    ],
)
def test_ends_of_answers_are_listed_by_either_file(
    generation: object, config: object, expected: set[int], tmp_path: Path
) -> None:
    if generation is not None:
        put(tmp_path, "generation_config", generation)
    put(tmp_path, "config", {"model_type": "llama", "eos_token_id": config})
    assert eos_ids(tmp_path) == expected


@pytest.mark.parametrize("listed", ["2", True, [0, "2"], -1, [[2]], 2.0, {}])
def test_ends_that_are_no_ids_are_refused(listed: object, tmp_path: Path) -> None:
    put(tmp_path, "config", {"eos_token_id": listed})
    with pytest.raises(TokenizerError, match=r"eos_token_id in .*config\.json is .* list of ids"):
        eos_ids(tmp_path)


def test_ends_beyond_the_vocabulary_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", generation={"eos_token_id": [2, 99_999]})
    beyond = r"eos_token_id in .*generation_config\.json is .*99999.* no id above \d+"
    with pytest.raises(TokenizerError, match=beyond):
        load(folder)
    mistral = tmp_path / "b"
    mistral.mkdir()
    (mistral / "tokenizer.model.v3").write_bytes(MISTRAL_FILES["v3"].read_bytes())
    put(mistral, "config", {"eos_token_id": 32_768})
    with pytest.raises(TokenizerError, match=r"config\.json is 32768, .* no id above 32767"):
        load(mistral)


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token"])
@pytest.mark.parametrize("token", [["</s>"], {}, {"content": {"a": "</s>"}}, 2, False])
def test_tokens_of_another_form_are_refused(name: str, token: object, tmp_path: Path) -> None:
    for file in ("tokenizer_config", "special_tokens_map"):
        put(tmp_path, file, {name: token})
        with pytest.raises(TokenizerError, match=rf"{name} in .*{file}\.json is .*or null"):
            named_tokens(tmp_path)
        put(tmp_path, file, {name: None, "add_bos_token": False})
        assert named_tokens(tmp_path) == {}


@pytest.mark.parametrize("field", ["additional_special_tokens", "extra_special_tokens"])
def test_lists_of_another_form_are_refused(field: str, tmp_path: Path) -> None:
    for tokens in ("<x>", ["<x>", ["<y>"]], [{}], {"a": 3}):
        put(tmp_path, "tokenizer_config", {field: tokens})
        with pytest.raises(TokenizerError, match=rf"{field} in .*config\.json is .* list tokens"):
            extra_special_tokens(tmp_path)
    for right in (None, [], {}, {"image": "<x>"}, [{"content": "<x>"}]):
        put(tmp_path, "tokenizer_config", {field: right})
        assert extra_special_tokens(tmp_path) == ({"<x>"} if right else set())


def test_templates_of_another_form_are_passed_over(tmp_path: Path) -> None:
    odd = [3, {"name": ["x"], "template": "x"}, {"name": "tool_use", "template": 3}]
    put(tmp_path, "tokenizer_config", {"chat_template": odd})
    assert template_source(tmp_path) is None
    put(
        tmp_path,
        "tokenizer_config",
        {"chat_template": [*odd, {"name": "default", "template": "y"}]},
    )
    assert template_source(tmp_path) == "y"


def test_a_copy_keeps_the_ends_that_the_models_config_lists(tmp_path: Path) -> None:
    source, destination = write(tmp_path / "a"), tmp_path / "b"
    put(source, "config", {"eos_token_id": [0, 1]})
    put(source, "generation_config", {"temperature": 0.5})
    (source / "generation_config.json").chmod(0o444)
    destination.mkdir()
    copy(source, destination)
    assert load(source).eos_ids == load(destination).eos_ids == {0, 1, 2}
    generation = read_object(destination / "generation_config.json")
    assert generation == {"temperature": 0.5, "eos_token_id": [0, 1]}


def test_a_mistral_answer_ends_where_the_config_says(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model.v3").write_bytes(MISTRAL_FILES["v3"].read_bytes())
    assert load(tmp_path).eos_ids == {2}
    put(tmp_path, "config", {"eos_token_id": [2, 20]})
    assert load(tmp_path).eos_ids == {2, 20}


def test_tokens_are_named_by_special_tokens_map_alone(tmp_path: Path) -> None:
    template = "{{ bos_token }}" + CHATML
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    expected = load(write(tmp_path / "a", template=template, config=tokens))
    folder = write(tmp_path / "b", template=template, config={})
    put(folder, "special_tokens_map", {**tokens, "bos_token": {"content": "<|endoftext|>"}})
    assert load(folder).chat(turns("Hi")) == expected.chat(turns("Hi"))
    assert load(folder).eos_ids == expected.eos_ids == {2}


def test_names_are_read_in_the_order_of_transformers(tmp_path: Path) -> None:
    import transformers

    first = {"eos_token": "<|endoftext|>", "pad_token": None, "bos_token": "<|im_start|>"}
    second = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}
    folder = write(tmp_path, config=first)
    put(folder, "special_tokens_map", second)
    added = {"2": {"content": "<|im_end|>", "special": True}}
    for config in (first, {**first, "added_tokens_decoder": added}):
        put(folder, "tokenizer_config", config)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        ours = named_tokens(folder)
        assert ours["bos_token"] == theirs.bos_token == "<|im_start|>"
        assert ours["eos_token"] == theirs.eos_token


def test_special_tokens_without_a_name_are_control_tokens(tmp_path: Path) -> None:
    folder = write(tmp_path)
    ids = load(folder).encode("<think>")
    assert len(ids) == 1
    put(folder, "special_tokens_map", {"additional_special_tokens": ["<think>", {"content": "x"}]})
    assert extra_special_tokens(folder) == {"<think>", "x"}
    tokenizer = load(folder)
    assert tokenizer.token_bytes(ids[0]) == b""
    assert ids[0] not in tokenizer.encode("<think>")
    assert tokenizer.decode(tokenizer.encode("<think>")) == "<think>"
