"""One of each kind of tokenizer, made once."""

from pathlib import Path

import pytest

from mixtral_jax.tokenization.mistral import MistralTokenizer
from mixtral_jax.tokenization.tokenizer import Tokenizer, load
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.support.tokenizers import LATER_TEKKEN, MISTRAL_FILES, SPECS, later_tekken, write


@pytest.fixture(scope="session")
def mistral_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tekken")
    later = {f"tekken-{version}": later_tekken(folder, version) for version in LATER_TEKKEN}
    return {**MISTRAL_FILES, **later}


@pytest.fixture(scope="session")
def all_tokenizers(
    tmp_path_factory: pytest.TempPathFactory, mistral_files: dict[str, Path]
) -> dict[str, Tokenizer]:
    inst = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    folders = tmp_path_factory.mktemp("tokenizers")
    return {
        **{version: MistralTokenizer(path) for version, path in mistral_files.items()},
        "byte-level": load(write(folders / "a", SPECS["byte-level"])),
        "sentencepiece": load(write(folders / "b", SPECS["sentencepiece"], inst)),
        "bytes": ByteTokenizer(),
    }
