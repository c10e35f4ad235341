"""The order of a conversion: names and progress, the tokenizer's files, the destination."""

import logging
from pathlib import Path

import numpy as np
import pytest

from convert.convert import convert
from convert.errors import ConversionError
from mixtral_jax.tokenization import tokenizer
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.support import sources


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
    with pytest.raises(ConversionError, match="dtype 'int4' is not supported"):
        convert(tmp_path, tmp_path / "dst", dtype="int4")
