"""MistralTokenizer: Mistral's own tokenizer files, whose chats mistral-common renders.

That library defines the format. The templates published beside the same weights refuse system
messages and differ in spaces.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mixtral_jax.errors import ChatError, TokenizerError
from mixtral_jax.tokenization.messages import Message, check_text, checked
from mixtral_jax.tokenization.vocabulary import Vocabulary, spm_bytes

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

    def __init__(self, path: Path, eos_ids: Iterable[int] = ()) -> None:
        """Read `path`, a `tokenizer.model`, `tokenizer.model.v1`, `.v2` or `.v3`.

        Args:
            path: the file.
            eos_ids: ids that end an answer beside </s>.

        Raises FileNotFoundError without it, TokenizerError if the file is none of those, or
        not what its name says.
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
            raise TokenizerError(f"{path} is not a sentencepiece model: {error}") from error
        version = TokenizerVersion(_mistral_version(path, pieces))
        self._model = SentencePieceTokenizer(path, version)
        super().__init__(
            [
                b"" if self._model.is_special(i) or i == self._model.unk_id else spm_bytes(piece)
                for i, piece in enumerate(pieces)
            ],
            eos_ids={self._model.eos_id, *eos_ids},
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
            raise TokenizerError(
                f"{path.name} calls itself {version}, but its pieces are not: "
                f"[INST] {'is' if has_instruct else 'is not'} one of them. Rename the file"
            )
    elif "[SYSTEM_PROMPT]" in pieces:
        version = "v7"
    else:
        version = "v3" if has_instruct else "v1"
    if version not in _MISTRAL_VERSIONS:
        raise TokenizerError(
            f"{path.name} is a Mistral tokenizer of version {version}; "
            f"supported are {', '.join(_MISTRAL_VERSIONS)}"
        )
    return version
