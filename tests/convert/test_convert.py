"""The order of a conversion: names and progress, the tokenizer's files, the destination."""

import logging
from pathlib import Path

import numpy as np
import pytest

import mixtral_jax
from convert.convert import convert, convert_once
from convert.errors import ConversionError
from convert.export import export
from mixtral_jax.tokenization import tokenizer
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.support import sources
from tests.support.tokenizers import byte_level_spec
from tests.support.tokenizers import write as write_tokenizer


def test_progress_and_names(tmp_path: Path) -> None:
    path, hf = sources.write(tmp_path / "Mistral-7B-v0.1", "folder", sources.DENSE, np.float32)
    calls: list[tuple[int, int]] = []
    card = convert(path, tmp_path / "dst", progress=lambda *call: calls.append(call))
    assert (card.name, card.provider) == ("mistralai-Mistral-7B-v01", "MistralAI")
    total = sum(value.nbytes for value in hf.values())
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
    card = convert(path, tmp_path / "other", name="mine", provider="me")
    assert (card.name, card.provider) == ("mine", "me")


def test_a_model_is_pulled_and_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = sources.write(tmp_path / "source", "folder", sources.DENSE, np.float32)
    pulled: list[str] = []
    monkeypatch.setattr("convert.convert.pull", lambda name: pulled.append(name) or path)
    for _ in range(2):
        checkpoint = convert_once("some/dense", folder=tmp_path / "made")
        assert checkpoint == tmp_path / "made" / "dense"
    mixture = convert_once("some/dense", upcycle_experts=4, folder=tmp_path / "made")
    assert pulled == ["some/dense", "some/dense"]
    assert mixture.name == "dense-4x"
    assert mixtral_jax.load(mixture, mesh=None)[0].config.num_experts == 4


def test_tokenizer_files_are_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = sources.DENSE | dict(vocab_size=ByteTokenizer().vocab_size)
    hf = sources.tensors(config)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        hf[name] = np.ones((config["vocab_size"], sources.D), np.float32)
    path = sources.write_hf(tmp_path / "src", config, hf)
    ByteTokenizer().save(path)
    convert(path, tmp_path / "dst")
    assert isinstance(tokenizer.load(tmp_path / "dst"), ByteTokenizer)
    assert not caplog.records


def tuned(folder: Path, vocab_size: int, **fields: object) -> Path:
    """Write a source with a small tokenizer.json, as the fine-tunes of others have it."""
    config = sources.DENSE | {"vocab_size": vocab_size, **fields}
    hf = sources.tensors(config)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        hf[name] = np.ones((vocab_size, sources.D), np.float32)
    return write_tokenizer(sources.write_hf(folder, config, hf))


NUM_IDS = byte_level_spec().get_vocab_size(with_added_tokens=True)


def test_answers_end_where_the_models_config_says(tmp_path: Path) -> None:
    path = tuned(tmp_path / "src", NUM_IDS, eos_token_id=[0, 1])
    convert(path, tmp_path / "dst")
    assert tokenizer.load(tmp_path / "dst").eos_ids == {0, 1, 2}
    export(tmp_path / "dst", tmp_path / "back")
    assert tokenizer.load(tmp_path / "back").eos_ids == {0, 1, 2}


def test_a_token_for_padding_beyond_the_vocabulary_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tuned(tmp_path / "src", NUM_IDS)
    spec = byte_level_spec()
    spec.add_special_tokens(["[PAD]"])
    spec.save(str(path / "tokenizer.json"))
    with caplog.at_level(logging.WARNING):
        convert(path, tmp_path / "dst")
    assert f"has {NUM_IDS + 1} ids, of which the model knows {NUM_IDS}" in caplog.text
    assert tokenizer.load(tmp_path / "dst").vocab_size == NUM_IDS + 1
    spec.add_tokens(["word"])  # text can write this one
    spec.save(str(path / "tokenizer.json"))
    with pytest.raises(ConversionError, match="it belongs to another model"):
        convert(path, tmp_path / "other")


def test_a_tokenizer_that_is_not_supported_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tuned(tmp_path / "src", NUM_IDS)
    (path / "tokenizer.json").write_text('{"model": {"type": "Newest"}}')
    with caplog.at_level(logging.WARNING):
        convert(path, tmp_path / "dst")
    assert "cannot be served" in caplog.text
    assert "tokenizer.json cannot be read by tokenizers" in caplog.text


def test_a_template_that_python_cannot_compile_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tuned(tmp_path / "src", NUM_IDS)
    (path / "chat_template.jinja").write_text("{% break %}")
    with caplog.at_level(logging.WARNING):
        convert(path, tmp_path / "dst")
        assert "cannot be served: the chat template is no valid Jinja template" in caplog.text
        caplog.clear()
        _, words = mixtral_jax.load(tmp_path / "dst", mesh=None)
    assert words is None
    assert "without a tokenizer, which cannot be used: the chat template is no" in caplog.text


def test_a_missing_tokenizer_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = sources.write(tmp_path / "src", "folder", sources.DENSE, np.float32)
    with caplog.at_level(logging.WARNING):
        convert(path, tmp_path / "dst")
    assert "without a tokenizer, the checkpoint cannot be served: found no" in caplog.text


def test_a_destination_that_is_taken(tmp_path: Path) -> None:
    path, _ = sources.write(tmp_path / "src", "folder", sources.DENSE, np.float32)
    (tmp_path / "dst").mkdir()
    convert(path, tmp_path / "dst")  # an empty folder is welcome
    before = sources.parameters(tmp_path / "dst")
    with pytest.raises(FileExistsError, match="not empty"):
        convert(path, tmp_path / "dst")
    sources.assert_same(sources.parameters(tmp_path / "dst"), before)
    with pytest.raises(ConversionError, match="is a mixtral-jax checkpoint already"):
        convert(tmp_path / "dst", tmp_path / "other")


def test_an_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="dtype 'int2' is not supported"):
        convert(tmp_path, tmp_path / "dst", dtype="int2")
