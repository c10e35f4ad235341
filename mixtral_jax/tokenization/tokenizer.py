"""From text and chats to token ids; `mixtral_jax.detokenizer` is the way back.

`load` finds out what a checkpoint's folder holds:

* `tokenizer.model*`: Mistral's sentencepiece files of versions v1, v2 and v3 -> `MistralTokenizer`,
  whose chats mistral-common renders, because that library defines the format. Templates published
  beside the same weights refuse system messages and differ in spaces.
* `tokenizer.json` and a chat template (models of the same architecture from elsewhere)
  -> `TemplateTokenizer`, in a file of its own.
* `byte_tokenizer.json`: one token a byte, nothing to download -> `ByteTokenizer`.

One promise holds for all of them: text from outside, be it a prompt or a message, becomes text
tokens only. The ids that end a turn or open another role come from the format alone.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from mixtral_jax.errors import ChatError
from mixtral_jax.tokenization.chat_template import ROLES, Message, check_text, checked
from mixtral_jax.tokenization.detokenizer import Detokenizer, Vocabulary, spm_bytes
from mixtral_jax.tokenization.huggingface import TemplateTokenizer, template_source

__all__ = [
    "ByteTokenizer",
    "ChatError",
    "Detokenizer",
    "Message",
    "MistralTokenizer",
    "TemplateTokenizer",
    "Tokenizer",
    "files",
    "load",
]


@runtime_checkable  # the tests' type checker asks isinstance
class Tokenizer(Protocol):
    """What serving and generation ask of a tokenizer. Ids are ints in [0, vocab_size)."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """The ids that end generation."""

    def encode(self, text: str) -> list[int]:
        """Plain text to be continued, opened by bos where the model has one."""

    def chat(self, messages: Sequence[Message], *, continue_last: bool = False) -> list[int]:
        """A chat, up to where the assistant's answer begins. Raises ChatError.

        With `continue_last` the last message is the beginning of that answer, which goes on from
        there: its turn is not closed.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the text; b"" for control tokens."""

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of a whole answer."""

    def detokenizer(self, *, continues: bool = False) -> Detokenizer:
        """The text of an answer that is still growing."""


_MISTRAL_VERSIONS = ("v1", "v2", "v3")
_MISTRAL_CHAT = (
    "A chat for this model ends with a user message, and has no empty assistant message and no "
    "system message right after an assistant's"
)


class MistralTokenizer(Vocabulary):
    """A Mistral sentencepiece model and the chat format of its version, by mistral-common.

    System text is merged into a user message as that library does: the first one in v1, the last
    one in v2 and v3. In v1, which has no control ids for it, "[INST]" is ordinary text wherever
    it comes from. The unknown token counts as a control token: these vocabularies have a piece
    for every byte, so no text needs it.
    """

    def __init__(self, path: Path) -> None:
        """Read `path`, a `tokenizer.model`, `tokenizer.model.v1`, `.v2` or `.v3`.

        Raises FileNotFoundError without it, ValueError if the file is none of those, or not what
        its name says.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        # Importing the library takes half a second, which only users of these files should pay.
        from mistral_common.protocol.instruct import normalize, validator
        from mistral_common.tokens.tokenizers import instruct, mistral
        from mistral_common.tokens.tokenizers.base import TokenizerVersion
        from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

        try:
            # The version only labels this object; the pieces, read first, say which one it is.
            pieces = SentencePieceTokenizer(path, TokenizerVersion.v1).vocab()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
        version = TokenizerVersion(_mistral_version(path, pieces))
        self._model = SentencePieceTokenizer(path, version)
        super().__init__(
            [
                b"" if self._model.is_special(i) or i == self._model.unk_id else spm_bytes(piece)
                for i, piece in enumerate(pieces)
            ],
            eos_ids=[self._model.eos_id],
            dummy_space=True,
        )
        formats = {
            TokenizerVersion.v1: instruct.InstructTokenizerV1,
            TokenizerVersion.v2: instruct.InstructTokenizerV2,
            TokenizerVersion.v3: instruct.InstructTokenizerV3,
        }
        self.version = version.value
        self._chats = mistral.MistralTokenizer(
            formats[version](self._model),
            validator=validator.get_validator(version, mode=validator.ValidationMode.test),
            request_normalizer=normalize.get_normalizer(version, None),
        )

    def encode(self, text: str) -> list[int]:
        """<s>, then the pieces of the text. Raises ValueError for text that is not Unicode."""
        check_text(text, "the text")
        return self._model.encode(text, bos=True, eos=False)

    def chat(self, messages: Sequence[Message], *, continue_last: bool = False) -> list[int]:
        """<s>[INST] ... [/INST] and so on, to the last [/INST] or, with `continue_last`, to the
        end of the assistant's text, where v2 and v3 leave spaces out. Raises ChatError.
        """
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct import messages as turns
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        classes = {
            "system": turns.SystemMessage,
            "user": turns.UserMessage,
            "assistant": turns.AssistantMessage,
        }
        chat = [
            classes[message["role"]](content=message["content"])
            for message in checked(messages, continue_last=continue_last)
        ]
        if continue_last:
            chat[-1] = turns.AssistantMessage(content=messages[-1]["content"], prefix=True)
        try:
            ids: list[int] = self._chats.encode_chat_completion(
                ChatCompletionRequest(messages=chat)
            ).tokens
            return ids
        except MistralCommonException as error:
            raise ChatError(f"{error}. {_MISTRAL_CHAT}") from error


def _mistral_version(path: Path, pieces: Sequence[str]) -> str:
    """The version by the file's name, else by its pieces.

    Pieces cannot tell v2 from v3: Mistral-7B-Instruct-v0.3 publishes as v3 the very bytes that
    mistral-common calls v2. A file that could be either is v3, the version of all open weights;
    without tools, which is all there is here, the two formats are the same.
    """
    has_instruct = "[INST]" in pieces
    if suffix := re.search(r"\.model\.(v\w+)$", path.name):
        version = suffix[1]
        if (version == "v1") == has_instruct:
            raise ValueError(
                f"{path.name} calls itself {version}, but its pieces are not: "
                f"[INST] {'is' if has_instruct else 'is not'} one of them. Rename the file"
            )
    elif "[SYSTEM_PROMPT]" in pieces:
        version = "v7"
    else:
        version = "v3" if has_instruct else "v1"
    if version not in _MISTRAL_VERSIONS:
        raise ValueError(
            f"{path.name} is a Mistral tokenizer of version {version}; "
            f"supported are {', '.join(_MISTRAL_VERSIONS)}"
        )
    return version


class ByteTokenizer(Vocabulary):
    """One token a byte, for models without a vocabulary of their own: demonstrations and tests.

    Ids 0 to 255 are the bytes of UTF-8; then come bos, eos and one id for each role. A chat is
    bos, then each message as its role, its bytes and eos, and at last the assistant's role.
    """

    _BOS, _EOS = 256, 257
    _ROLE_IDS = {role: 258 + place for place, role in enumerate(ROLES)}
    _FILE = "byte_tokenizer.json"

    def __init__(self) -> None:
        controls = [b""] * (2 + len(ROLES))
        super().__init__([*(bytes([byte]) for byte in range(256)), *controls], [self._EOS])

    def encode(self, text: str) -> list[int]:
        """bos and the bytes of the text. Raises ValueError for text that is not Unicode."""
        check_text(text, "the text")
        return [self._BOS, *text.encode()]

    def chat(self, messages: Sequence[Message], *, continue_last: bool = False) -> list[int]:
        """The chat in ids, e.g. [256, 259, 104, 105, 257, 260] for the user's "hi"."""
        ids = [self._BOS]
        for message in checked(messages, continue_last=continue_last):
            ids += [self._ROLE_IDS[message["role"]], *message["content"].encode(), self._EOS]
        return ids[:-1] if continue_last else [*ids, self._ROLE_IDS["assistant"]]

    def save(self, folder: Path) -> None:
        """Write the file by which `load` knows that the folder's model speaks bytes."""
        (folder / self._FILE).write_text('{"tokenizer": "bytes"}\n', encoding="utf-8")


_FILES = (
    "*.model.v*",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "byte_tokenizer.json",
)


def files(folder: Path) -> list[Path]:
    """The files in a folder that `load` may read: a copy of them loads the same tokenizer."""
    return sorted(path for pattern in _FILES for path in folder.glob(pattern) if path.is_file())


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder.

    A versioned `tokenizer.model.v3` comes before `tokenizer.model`, that before `tokenizer.json`.
    But models tuned from Mistral's keep its `tokenizer.model` and may speak otherwise: where a
    chat template does not write [INST], template and `tokenizer.json` decide.

    Raises FileNotFoundError where there is none, ValueError where one cannot be followed.
    """
    versioned = sorted(folder.glob("*.model.v*"))
    if versioned:
        return MistralTokenizer(versioned[-1])
    if (folder / "tokenizer.model").is_file() and "[INST]" in (template_source(folder) or "[INST]"):
        return MistralTokenizer(folder / "tokenizer.model")
    if (folder / "tokenizer.json").is_file():
        return TemplateTokenizer(folder)
    if (folder / ByteTokenizer._FILE).is_file():
        return ByteTokenizer()
    raise FileNotFoundError(
        f"no tokenizer in {folder}: looked for tokenizer.model.v1, .v2 or .v3, tokenizer.model, "
        "tokenizer.json and byte_tokenizer.json"
    )
