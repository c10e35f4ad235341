"""Tokenizer: the interface of all tokenizers, and `load`, which picks the one of a checkpoint.

* `tokenizer.model*` and `tekken.json` are Mistral's own files: `MistralTokenizer`.
* `tokenizer.json` with a chat template is the form of models from elsewhere: `TemplateTokenizer`.
* `byte_tokenizer.json` stands for one token per byte: `ByteTokenizer`.

All of them keep one promise: text from outside, be it a prompt or a message, becomes text tokens
only. The ids that end a turn or open another role come from the format alone.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from mixtral_jax.errors import TokenizerError
from mixtral_jax.tokenization.detokenizer import Detokenizer
from mixtral_jax.tokenization.huggingface import TOKENIZER_FILE, TemplateTokenizer
from mixtral_jax.tokenization.messages import Message, Tool
from mixtral_jax.tokenization.mistral import MistralTokenizer, foreign_format
from mixtral_jax.tokenization.special_tokens import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    eos_ids,
    read_object,
)
from mixtral_jax.tokenization.tool_form import ToolForm
from mixtral_jax.tokenization.toy_bytes import TOY_FILE, ByteTokenizer


@runtime_checkable  # the type checker of the tests uses isinstance
class Tokenizer(Protocol):
    """The interface that serving and generation use. Ids are ints in [0, vocab_size)."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def required_vocab_size(self) -> int:
        """Number of ids that a model must have, because this tokenizer can write them."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end generation."""

    @property
    def dummy_space(self) -> bool:
        """True if encoding puts a space before each text, which decoding takes off again."""

    @property
    def tool_form(self) -> ToolForm:
        """Form in which this model writes calls of tools."""

    def encode(self, text: str, *, with_special: bool = True) -> list[int]:
        """Return the ids of plain text, after bos where the model has one.

        Without `with_special` they are those of the text alone.
        """

    def chat(
        self,
        messages: Sequence[Message],
        *,
        continue_last: bool = False,
        asks: bool = True,
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """Return the ids of a chat, up to where the assistant's answer begins. Raises ChatError.

        With `continue_last` the last message is the beginning of that answer, which goes on from
        there: its turn is not closed. Without `asks` they end behind the last message, so that the
        model may open any turn. `tools` are those that the model may call.
        """

    def closed_chat(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> list[int]:
        """Return the ids of a chat that ends with an assistant's message, whose turn is closed.

        They are those of `chat` without the messages from that one on, then what the model writes,
        which an id of `eos_ids` ends, then whatever the format puts behind a turn. In a format that
        moves the system message or the tools to the last user's message the chat has no later one,
        so they stand where they stood when the answer was asked for. Raises ChatError.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to the text; b"" for control tokens."""

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of a whole answer."""

    def detokenizer(self, *, continues: bool = False) -> Detokenizer:
        """Begin the text of an answer that is still growing.

        `continues` says that the answer continues a prompt's text, so that its first space stays.
        """


_FILES = (
    "*.model.v*",
    "tekken*.json",
    "tokenizer.model",
    TOKENIZER_FILE,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    TOY_FILE,
)


def files(folder: Path) -> list[Path]:
    """Return the files of a folder that `load` may read and that belong to the tokenizer alone."""
    return sorted(path for pattern in _FILES for path in _visible(folder, pattern))


def copy(source: Path, destination: Path) -> None:
    """Copy the tokenizer of one folder into another, where `load` then makes the same one of it.

    The ids that end an answer may stand in the model's config.json alone, which is not copied:
    they are written into generation_config.json then.
    """
    for file in files(source):
        shutil.copy(file, destination)
    try:
        ends = eos_ids(source)
    except TokenizerError:
        return  # `load` says of the copy what is wrong with it
    if ends and not eos_ids(destination):
        generation = destination / GENERATION_CONFIG
        content = {**read_object(generation), "eos_token_id": sorted(ends)}
        generation.unlink(missing_ok=True)  # a copy of a read-only file is read-only too
        generation.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint's folder.

    A versioned `tokenizer.model.v3` comes before `tekken.json`, that before `tokenizer.model`, and
    that before `tokenizer.json`. But models tuned from Mistral's keep its files and may speak
    otherwise: where the chat template is not Mistral's, template and `tokenizer.json` decide.

    Raises FileNotFoundError where there is none, TokenizerError where one cannot be followed.
    """
    file = _mistral_file(folder)
    reason = None
    if file is not None:
        tokenizer = MistralTokenizer(file, eos_ids(folder))
        eos_ids(folder, tokenizer.vocab_size)  # refuses those that it has not
        reason = foreign_format(folder, tokenizer.version)
        if reason is None:
            return tokenizer
    if (folder / TOKENIZER_FILE).is_file():
        return TemplateTokenizer(folder)
    if file is not None:
        raise TokenizerError(
            f"{file} alone does not say how this model's chats are written: {reason}. Put the "
            "model's tokenizer.json beside it, which transformers writes: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    if (folder / TOY_FILE).is_file():
        return ByteTokenizer()
    raise FileNotFoundError(
        f"no tokenizer in {folder}: looked for tokenizer.model.v1 to .v7, tekken.json, "
        "tokenizer.model, tokenizer.json and byte_tokenizer.json"
    )


def _mistral_file(folder: Path) -> Path | None:
    """Return Mistral's own tokenizer file, the one of the latest version if there are several."""
    for pattern in ("*.model.v*", "tekken*.json", "tokenizer.model"):
        if paths := sorted(_visible(folder, pattern)):
            return paths[-1]
    return None


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a pattern, without hidden ones.

    macOS puts a hidden "._NAME" beside NAME on disks that cannot hold its attributes.
    """
    paths = folder.glob(pattern)
    return [path for path in paths if path.is_file() and not path.name.startswith(".")]
