"""Models with their tokenizers: saved from memory, and loaded where the tokenizer cannot be."""

import logging
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import mixtral_jax
from convert.convert import convert
from convert.export import export
from mixtral_jax.checkpoint.folder import Card
from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.errors import ConfigError, TokenizerError, UserError
from mixtral_jax.model.transformer import named_parameters
from mixtral_jax.tokenization import tokenizer
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.support import sources, tokenizers


@pytest.mark.parametrize("dtype", ["float32", "int8", "fp8"])
def test_a_model_changed_in_memory_is_saved_and_loaded(tmp_path: Path, dtype: str) -> None:
    model, words = mixtral_jax.load("tiny-random", mesh=None, dtype=dtype)
    norm = model.norm.weight
    norm.set_value(norm[...] * 2)
    mixtral_jax.save(model, words, tmp_path / "mine", name="doubled", provider="me")
    loaded, again = mixtral_jax.load(tmp_path / "mine", mesh=None)
    assert isinstance(again, ByteTokenizer)
    assert Card.read(tmp_path / "mine") == Card(
        model=model.config, dtype=dtype, name="doubled", provider="me"
    )
    want = named_parameters(model)
    for name, variable in named_parameters(loaded).items():
        np.testing.assert_array_equal(variable.get_value(), want[name].get_value(), err_msg=name)
    assert loaded.norm.weight[...].tolist() == (2 * jnp.ones(model.config.hidden_size)).tolist()
    with pytest.raises(FileExistsError):
        mixtral_jax.save(model, words, tmp_path / "mine")


def test_a_model_without_a_tokenizer_is_saved_and_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = mixtral_jax.load("tiny-random", mesh=None)
    mixtral_jax.save(model, None, tmp_path / "mine")
    assert Card.read(tmp_path / "mine").name == "mine"
    with caplog.at_level(logging.WARNING):
        assert mixtral_jax.load(tmp_path / "mine", mesh=None)[1] is None
    assert "is loaded without a tokenizer" in caplog.text
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        _ = open_pretrained(tmp_path / "mine").tokenizer


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"type": "Newest"}}'])
def test_a_tokenizer_that_is_not_supported_leaves_the_weights(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, hf = sources.write(tmp_path / "src", "folder", sources.DENSE, np.float32)
    (path / "tokenizer.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        convert(path, tmp_path / "ours")
        assert "without a tokenizer, the checkpoint cannot be served" in caplog.text
        model, words = mixtral_jax.load(tmp_path / "ours", mesh=None)
    assert words is None
    assert "is loaded without a tokenizer" in caplog.text
    sources.assert_same(
        {name: np.asarray(v.get_value()) for name, v in named_parameters(model).items()},
        sources.ours(hf),
    )
    with pytest.raises(TokenizerError):
        _ = open_pretrained(tmp_path / "ours").tokenizer
    export(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == text


def test_what_is_no_tokenizer_of_ours_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = mixtral_jax.load("tiny-random", mesh=None)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    words: Any = 5
    with pytest.raises(UserError, match="type int has no files to save; give .* or None to save"):
        mixtral_jax.save(model, words, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("dtype", ["", 0, False])
def test_a_dtype_that_is_false_is_not_the_stored_one(
    tmp_path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy and a folder each look at it themselves."""
    model, words = mixtral_jax.load("tiny-random", mesh=None)
    mixtral_jax.save(model, words, tmp_path / "mine")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for path in ("tiny-random", tmp_path / "mine"):
        with pytest.raises(ConfigError, match=f"dtype '{dtype}' is not supported; use float32"):
            mixtral_jax.load(path, mesh=None, dtype=dtype)


def test_tokenizers_files_come_from_where_it_was_loaded(tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    tokenizers.write(tmp_path / "words", tokenizers.byte_level_spec())
    words = tokenizer.load(tmp_path / "words")
    model, _ = mixtral_jax.load("tiny-random", mesh=None)
    mixtral_jax.save(model, words, tmp_path / "mine")
    again = tokenizer.load(tmp_path / "mine")
    assert again.encode("A tale of two cities") == words.encode("A tale of two cities")
    assert again.eos_ids == words.eos_ids
    shutil.rmtree(tmp_path / "words")
    with pytest.raises(FileNotFoundError, match=r"files were in .*words, which is gone"):
        mixtral_jax.save(model, words, tmp_path / "late")
    assert not (tmp_path / "late").exists()
