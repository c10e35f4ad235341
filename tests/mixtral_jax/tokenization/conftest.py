"""One of each kind of tokenizer, made once."""

import pytest

from mixtral_jax.tokenization.mistral import MistralTokenizer
from mixtral_jax.tokenization.tokenizer import Tokenizer, load
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.support.tokenizers import MISTRAL_FILES, SPECS, write


@pytest.fixture(scope="session")
def all_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    inst = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    folders = tmp_path_factory.mktemp("tokenizers")
    return {
        **{version: MistralTokenizer(path) for version, path in MISTRAL_FILES.items()},
        "byte-level": load(write(folders / "a", SPECS["byte-level"])),
        "sentencepiece": load(write(folders / "b", SPECS["sentencepiece"], inst)),
        "bytes": ByteTokenizer(),
    }
