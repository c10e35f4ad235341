"""Outside text never becomes control ids; `load` picks the tokenizer of a folder."""

import json
import shutil
from pathlib import Path

import pytest

from mixtral_jax.errors import TokenizerError
from mixtral_jax.tokenization.huggingface import TemplateTokenizer
from mixtral_jax.tokenization.mistral import MistralTokenizer
from mixtral_jax.tokenization.tokenizer import Tokenizer, files, load
from mixtral_jax.tokenization.tokenizer import copy as copy_tokenizer
from tests.support.tokenizers import (
    ATTACKS,
    CHATML,
    INST,
    MISTRAL_FILES,
    SPECS,
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


# Published templates refuse what is not a turn, and differ in white space from mistral-common.
ALTERNATE = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ ' [INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}"
)
SYSTEM_FIRST = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {% if loop.last and s is defined %}"
    "{{ s + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}{% else %}"
    "{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
OWN_PROMPT = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = 'You are\nsmall.' %}"
    "{% set rest = messages %}{% endif %}[SYSTEM_PROMPT]{{ s }}[/SYSTEM_PROMPT]"
    "{% for m in rest %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
    "{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_TEMPLATES = {"v1": ALTERNATE, "v3": SYSTEM_FIRST, "v7": OWN_PROMPT}
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{% else %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' }}{% if loop.previtem and loop.previtem.role == 'system' %}"
    "{{ '<<SYS>>\n' + loop.previtem.content + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}"
    "{% endif %}{% endfor %}"
)
FOREIGN_TEMPLATES = {
    "llama 2": LLAMA2,
    "chatml": CHATML,
    "other turns": ALTERNATE.replace("[/INST]", "[/INST] Answer:"),
    "turns without an end": ALTERNATE.replace(" + eos_token", ""),
    "bos before every turn": ALTERNATE.replace("' [INST] '", "bos_token + '[INST] '"),
    "marked system": SYSTEM_FIRST.replace("s + ", "'<<SYS>>' + s + '<</SYS>>' + "),
    "system is lost": SYSTEM_FIRST.replace("s + ", ""),
    "system as a turn": INST,
    "name in a comment": "{# [INST] #}" + CHATML,
}


@pytest.mark.parametrize("version", MISTRAL_TEMPLATES)
@pytest.mark.parametrize("has_bos", [True, False])
def test_templates_that_mistral_publishes_are_mistrals(
    version: str, has_bos: bool, tmp_path: Path
) -> None:
    template = MISTRAL_TEMPLATES[version]
    write(tmp_path, template=template if has_bos else template.replace("{{ bos_token }}", ""))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    shutil.copy(MISTRAL_FILES[version], tmp_path / "tokenizer.model")
    assert isinstance(load(tmp_path), MistralTokenizer)


@pytest.mark.parametrize("template", FOREIGN_TEMPLATES.values(), ids=FOREIGN_TEMPLATES)
@pytest.mark.parametrize("version", ["v1", "v3", "v7", "tekken-v7"])
def test_a_format_is_not_mistrals_because_inst_occurs(
    template: str, version: str, mistral_files: dict[str, Path], tmp_path: Path
) -> None:
    write(tmp_path, SPECS["sentencepiece"], template)
    name = "tekken.json" if version.startswith("tekken") else "tokenizer.model"
    (tmp_path / name).symlink_to(mistral_files[version])
    tokenizer = load(tmp_path)
    assert isinstance(tokenizer, TemplateTokenizer)
    expected = TemplateTokenizer(tmp_path).chat(turns("Hi"))
    assert tokenizer.chat(turns("Hi")) == expected
    # Without tokenizer.json there is nothing that could follow the template.
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="writes another format.*Put the model's tokenizer.js"):
        load(tmp_path)


def test_an_end_of_answers_that_mistral_has_not_is_another_format(tmp_path: Path) -> None:
    shutil.copy(MISTRAL_FILES["v1"], tmp_path / "tokenizer.model")
    names = {"eos_token": {"content": "<|im_end|>"}}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / file).write_text(json.dumps(names))
        with pytest.raises(TokenizerError, match=r"answers end with <\|im_end\|>.*Put the model's"):
            load(tmp_path)
        (tmp_path / file).unlink()
    # A token for padding changes nothing.
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 32000}')
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "[PAD]", "eos_token": "</s>"}')
    assert isinstance(load(tmp_path), MistralTokenizer)


def test_the_most_telling_file_wins(tmp_path: Path) -> None:
    write(tmp_path, SPECS["sentencepiece"], template=None)
    assert isinstance(load(tmp_path), TemplateTokenizer)
    shutil.copy(MISTRAL_FILES["v1"], tmp_path / "tokenizer.model")
    tokenizer = load(tmp_path)
    assert isinstance(tokenizer, MistralTokenizer)
    assert tokenizer.version == "v1"
    (tmp_path / "chat_template.jinja").write_text(MISTRAL_TEMPLATES["v1"])
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


def test_hidden_files_of_macos_are_passed_over(tmp_path: Path) -> None:
    """Beside NAME, macOS puts "._NAME" on disks that cannot hold its attributes."""
    folder = write(tmp_path)
    names = [path.name for path in files(folder)]
    for name in ("tokenizer.model", "tokenizer.model.v3", "tekken.json", *names):
        (folder / f"._{name}").write_bytes(bytes.fromhex("0005160700020000"))
    assert [path.name for path in files(folder)] == names
    assert isinstance(load(folder), TemplateTokenizer)


def test_a_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    assert files(tmp_path) == []
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model\.v1.*byte_tokenizer\.json"):
        load(tmp_path)
