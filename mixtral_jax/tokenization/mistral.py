"""MistralTokenizer: Mistral's own tokenizer files, whose chats mistral-common renders.

That library defines the formats. The templates published beside the same weights refuse system
messages and differ in spaces.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mixtral_jax.errors import ChatError, TokenizerError
from mixtral_jax.tokenization.chat_template import ChatTemplate
from mixtral_jax.tokenization.messages import Message, Tool, check_text, checked
from mixtral_jax.tokenization.mistral_chat import NOT_CUT, MistralChat, call_form
from mixtral_jax.tokenization.special_tokens import named_tokens, template_source
from mixtral_jax.tokenization.tool_prompt import PROMPT_FORM, prompted
from mixtral_jax.tokenization.vocabulary import Vocabulary, spm_bytes

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

_SENTENCEPIECE_VERSIONS = ("v1", "v2", "v3", "v7")
_TEKKEN_VERSIONS = ("v3", "v7", "v11", "v13")
_BOS, _EOS = "<s>", "</s>"
# A chat of one-letter messages, by which a template's format is recognised.
_SYSTEM: Message = {"role": "system", "content": "s"}
_TURNS: list[Message] = [
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "w"},
]


class MistralTokenizer(Vocabulary):
    """A Mistral vocabulary and the chat format of its version, by mistral-common.

    Vocabularies are sentencepiece models of versions v1, v2, v3 and v7, or tekken files (byte-level
    BPE) of versions v3, v7, v11 and v13. Versions up to v3 merge system text into a user message
    as that library does: the first one in v1, the last one in v2 and v3. Later versions have
    control tokens for it. In v1, which has no control ids, "[INST]" is ordinary text wherever it
    comes from. The unknown token counts as a control token: these vocabularies have a piece for
    every byte, so no text needs it.
    """

    def __init__(self, path: Path, eos_ids: Iterable[int] = ()) -> None:
        """Read `path`: a `tekken.json`, or a `tokenizer.model` with or without its version.

        Args:
            path: the file.
            eos_ids: ids that end an answer beside </s>.

        Raises FileNotFoundError without it, TokenizerError if the file is none of those, or
        not what its name says.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        self.folder = path.parent  # where a copy of its files begins
        self._model: Tekkenizer | SentencePieceTokenizer
        if path.suffix == ".json":
            self._model = _tekken(path)
            pieces = [self._model.id_to_byte_piece(i) for i in range(self._model.n_words)]
        else:
            self._model = _sentencepiece(path)
            pieces = [
                b"" if self._model.is_special(i) or i == self._model.unk_id else spm_bytes(piece)
                for i, piece in enumerate(self._model.vocab())
            ]
        super().__init__(
            pieces,
            eos_ids={self._model.eos_id, *eos_ids},
            dummy_space=path.suffix != ".json",
        )
        self.version = self._model.version.value
        self._chats = MistralChat(self._model)
        self.tool_form = (
            call_form(self._model, self.version, dummy_space=self.dummy_space) or PROMPT_FORM
        )

    def encode(self, text: str, *, with_special: bool = True) -> list[int]:
        """Return <s>, then the pieces of the text; without `with_special` the pieces alone.

        Raises ChatError for text that is not Unicode, or whose white space is so long that
        tekken's pattern runs out of stack.
        """
        check_text(text, "the text")
        try:
            return self._model.encode(text, bos=with_special, eos=False)
        except ValueError as error:
            raise ChatError(f"the text {NOT_CUT}: {error}") from error

    def chat(
        self,
        messages: Sequence[Message],
        *,
        continue_last: bool = False,
        asks: bool = True,
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """Return <s>[INST] ... [/INST] and so on, to the last [/INST].

        With `continue_last` it ends with the assistant's text instead, where v2 and v3 leave
        spaces out. Nothing opens an answer in these formats, so that `asks` changes nothing. Tools,
        calls and results are written in the format of the version; v1 has none,
        and is asked by a prompt (see `tool_prompt`). Raises ChatError.
        """
        chat = checked(messages, continue_last=continue_last)
        if self.version == "v1":
            chat, tools = prompted(chat, tools), ()
        return self._chats.ids(chat, continue_last=continue_last, tools=tools)

    def closed_chat(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> list[int]:
        """Return <s>[INST] ... [/INST] and so on, to the </s> of the last message, an assistant's.

        System text and tools stand where they stood when that message was asked for. Raises
        ChatError.
        """
        chat = checked(messages, closes_last=True)
        if self.version == "v1":
            chat, tools = prompted(chat, tools), ()
        return self._chats.ids(chat, closes_last=True, tools=tools)


def foreign_format(folder: Path, version: str) -> str | None:
    """Return why the chats of a checkpoint are not in Mistral's format, or None if they are.

    Models tuned from Mistral's keep its tokenizer file and may speak otherwise. The chat template
    beside it is asked to write two small chats, which are compared with those of the version but
    for white space, where the published templates differ from mistral-common. A template may
    refuse system messages and put in a system prompt of its own.

    Args:
        folder: the checkpoint's folder.
        version: the version of its tokenizer file, such as "v3".
    """
    named = named_tokens(folder)
    if (eos := named.get("eos_token", _EOS)) != _EOS:
        return f"answers end with {eos}, which is no token of Mistral's"
    source = template_source(folder)
    if source is None:
        return None
    template = ChatTemplate(source, {"bos_token": _BOS, **named})
    written = [_written(template, chat) for chat in (_TURNS, [_SYSTEM, _TURNS[0]])]
    turns = "[INST]u[/INST]a</s>[INST]w[/INST]"
    own_prompt = r"\[SYSTEM_PROMPT\].*?\[/SYSTEM_PROMPT\]"
    if version in ("v1", "v2", "v3"):
        expected = [re.escape(turns), re.escape("[INST]su[/INST]")]
    else:
        system = "[SYSTEM_PROMPT]s[/SYSTEM_PROMPT][INST]u[/INST]"
        expected = [f"({own_prompt})?{re.escape(turns)}", re.escape(system)]
    for text, pattern in zip(written, expected, strict=True):
        if text is not None and not re.fullmatch(pattern, text.removeprefix(_BOS), re.DOTALL):
            return "its chat template writes another format"
    return "its chat template refuses every chat" if written == [None, None] else None


def _written(template: ChatTemplate, chat: list[Message]) -> str | None:
    """Return the chat as a template writes it, without white space; None if it is refused."""
    try:
        return "".join(template.render(chat).split())
    except ChatError:
        return None


def _tekken(path: Path) -> "Tekkenizer":
    """Read a tekken file. Raises TokenizerError for what mistral-common cannot read."""
    # Importing the library takes half a second, which only users of these files should pay.
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    try:
        model = Tekkenizer.from_file(path)
    except Exception as error:  # the library asserts and indexes without a check
        raise TokenizerError(
            f"{path} is not a tekken file that mistral-common can read: "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error
    _check_version(path, model.version.value, _TEKKEN_VERSIONS)
    return model


def _sentencepiece(path: Path) -> "SentencePieceTokenizer":
    """Read a sentencepiece model of Mistral's, and find out its version."""
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    try:
        # The version only labels this object; the pieces, read first, say which one it is.
        pieces = SentencePieceTokenizer(path, TokenizerVersion.v1).vocab()
    except (RuntimeError, OSError) as error:
        raise TokenizerError(f"{path} is not a sentencepiece model: {error}") from error
    version = _sentencepiece_version(path, pieces)
    _check_version(path, version, _SENTENCEPIECE_VERSIONS)
    return SentencePieceTokenizer(path, TokenizerVersion(version))


def _sentencepiece_version(path: Path, pieces: Sequence[str]) -> str:
    """Return the version by the file's name, else by its pieces.

    Pieces cannot tell v2 from v3: Mistral-7B-Instruct-v0.3 publishes as v3 the very bytes that
    mistral-common calls v2. A file that could be either is v3, the version of all open weights;
    without tools the two formats are the same. A suffix such as m1 in v7m1 says how images are
    cut, which no text depends on.
    """
    has_instruct = "[INST]" in pieces
    has_system = "[SYSTEM_PROMPT]" in pieces
    suffix = re.search(r"\.model\.(v\d+)(m\d+)?$", path.name)
    if suffix is None:
        return "v7" if has_system else "v3" if has_instruct else "v1"
    version = suffix[1]
    number = int(version[1:])
    for token, is_there, since in (
        ("[INST]", has_instruct, 2),
        ("[SYSTEM_PROMPT]", has_system, 7),
    ):
        if is_there != (number >= since):
            raise TokenizerError(
                f"{path.name} calls itself {version}, but its pieces are not: "
                f"{token} {'is' if is_there else 'is not'} one of them. Rename the file"
            )
    return version


def _check_version(path: Path, version: str, supported: Sequence[str]) -> None:
    if version not in supported:
        raise TokenizerError(
            f"{path.name} is a Mistral tokenizer of version {version}; "
            f"supported are {', '.join(supported)}"
        )
