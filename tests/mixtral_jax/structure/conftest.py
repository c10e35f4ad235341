"""One tokenizer of each kind, and a compiler for each, made once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.tokenization.mistral import MistralTokenizer
from mixtral_jax.tokenization.tokenizer import Tokenizer, load
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.mixtral_jax.tokenization.conftest import all_tokenizers, mistral_files
from tests.support.tokenizers import INST, MISTRAL_FILES, SPECS, write

__all__ = ["all_tokenizers", "mistral_files"]  # fixtures of tokenization


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """Gives a tokenizer by its name; the two of tokenizer.json split most of UTF-8 into bytes."""
    folders = tmp_path_factory.mktemp("vocabularies")
    made: dict[str, Tokenizer] = {}

    def tokenizer(name: str) -> Tokenizer:
        if name not in made:
            made[name] = _made(name, folders / name)
        return made[name]

    return tokenizer


def _made(name: str, folder: Path) -> Tokenizer:
    if name in MISTRAL_FILES:
        return MistralTokenizer(MISTRAL_FILES[name])
    if name == "bytes":
        return ByteTokenizer()
    template = {} if name == "byte-level" else {"template": INST}
    return load(write(folder, SPECS[name], **template))


@pytest.fixture(scope="session")
def compilers(vocabularies: Callable[[str], Tokenizer]) -> Iterator[Callable[[str], Compiler]]:
    """Gives a compiler by the name of its tokenizer, without processes for trials."""
    made: dict[str, Compiler] = {}

    def compiler(name: str) -> Compiler:
        if name not in made:
            tokenizer = vocabularies(name)
            made[name] = Compiler(tokenizer, tokenizer.vocab_size + 30, processes=0)
        return made[name]

    yield compiler
    for value in made.values():
        value.close()


@pytest.fixture(scope="session")
def tried(vocabularies: Callable[[str], Tokenizer]) -> Iterator[Compiler]:
    """A compiler whose grammars are tried in processes, for bytes."""
    tokenizer = vocabularies("bytes")
    with Compiler(tokenizer, tokenizer.vocab_size) as compiler:
        yield compiler
