"""Outside text never becomes control ids; `load` picks the tokenizer of a folder."""

import shutil
from pathlib import Path

import pytest

from mixtral_jax.tokenization.huggingface import TemplateTokenizer
from mixtral_jax.tokenization.mistral import MistralTokenizer
from mixtral_jax.tokenization.tokenizer import Tokenizer, files, load
from mixtral_jax.tokenization.tokenizer import copy as copy_tokenizer
from tests.support.tokenizers import (
    ATTACKS,
    CHATML,
    INST,
    MISTRAL_FILES,
    control_ids,
    each,
    turns,
    write,
)


@each
@pytest.mark.parametrize("attack", ATTACKS)
def test_outside_text_never_becomes_control_ids(
    name: str, attack: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[name]
    harmless, attacked = tokenizer.encode("x"), tokenizer.encode(f"x{attack}x{attack}")
    assert control_ids(tokenizer, attacked) == control_ids(tokenizer, harmless)
    for place in range(3):
        contents = ["x", "x", "x"]
        harmless = tokenizer.chat(turns(*contents))
        contents[place] += attack
        attacked = tokenizer.chat(turns(*contents))
        assert control_ids(tokenizer, attacked) == control_ids(tokenizer, harmless)


def test_the_most_telling_file_wins(tmp_path: Path) -> None:
    write(tmp_path, template=None)
    assert isinstance(load(tmp_path), TemplateTokenizer)
    shutil.copy(MISTRAL_FILES["v1"], tmp_path / "tokenizer.model")
    tokenizer = load(tmp_path)
    assert isinstance(tokenizer, MistralTokenizer)
    assert tokenizer.version == "v1"
    (tmp_path / "chat_template.jinja").write_text(INST)
    assert isinstance(load(tmp_path), MistralTokenizer)
    shutil.copy(MISTRAL_FILES["tekken-v3"], tmp_path / "tekken.json")
    tokenizer = load(tmp_path)
    assert isinstance(tokenizer, MistralTokenizer)
    assert tokenizer.vocab_size == 131_072
    for version in ("v2", "v3"):
        shutil.copy(MISTRAL_FILES[version], tmp_path / f"tokenizer.model.{version}")
        tokenizer = load(tmp_path)
        assert isinstance(tokenizer, MistralTokenizer)
        assert tokenizer.version == version


def test_a_tuned_model_with_a_format_of_its_own_keeps_it(tmp_path: Path) -> None:
    write(tmp_path, template=CHATML)
    shutil.copy(MISTRAL_FILES["v1"], tmp_path / "tokenizer.model")
    assert isinstance(load(tmp_path), TemplateTokenizer)


def test_a_copy_of_the_files_loads_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", generation={"eos_token_id": 0})
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<s>"}')
    (folder / "config.json").write_text("{}")
    copy = tmp_path / "b"
    copy.mkdir()
    copy_tokenizer(folder, copy)
    assert not (copy / "config.json").exists()
    assert load(copy).chat(turns("a")) == load(folder).chat(turns("a"))
    assert load(copy).eos_ids == {0, 2}
    assert [path.name for path in files(copy)] == [path.name for path in files(folder)]


def test_a_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    assert files(tmp_path) == []
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model\.v1.*byte_tokenizer\.json"):
        load(tmp_path)
