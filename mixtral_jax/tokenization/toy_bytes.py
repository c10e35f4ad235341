"""ByteTokenizer: one token per byte, with nothing to download."""

from collections.abc import Sequence
from pathlib import Path

from mixtral_jax.tokenization.messages import Message, Tool, check_text, checked
from mixtral_jax.tokenization.tool_prompt import PROMPT_FORM, prompted
from mixtral_jax.tokenization.vocabulary import Vocabulary

TOY_FILE = "byte_tokenizer.json"


class ByteTokenizer(Vocabulary):
    """One token per byte, for models without a vocabulary of their own: demonstrations and tests.

    Ids 0 to 255 are the bytes of UTF-8; then come bos, eos and one id for each role. A chat is
    bos, then each message as its role, its bytes and eos, and at last the assistant's role.
    """

    _BOS, _EOS = 256, 257
    _ROLE_IDS = {"system": 258, "user": 259, "assistant": 260}

    tool_form = PROMPT_FORM

    def __init__(self) -> None:
        controls = [b""] * (2 + len(self._ROLE_IDS))
        super().__init__([*(bytes([byte]) for byte in range(256)), *controls], [self._EOS])

    def encode(self, text: str, *, with_special: bool = True) -> list[int]:
        """Return bos and the bytes of the text; without `with_special` the bytes alone.

        Raises ChatError for text that is not Unicode.
        """
        check_text(text, "the text")
        return [*([self._BOS] if with_special else []), *text.encode()]

    def chat(
        self,
        messages: Sequence[Message],
        *,
        continue_last: bool = False,
        asks: bool = True,
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """Return the chat's ids, e.g. [256, 259, 104, 105, 257, 260] for the user's "hi".

        Without `asks` the last role, 260, is left out. Tools are asked for by a prompt (see
        `tool_prompt`).
        """
        ids = self._turns(checked(messages, continue_last=continue_last), tools)
        if continue_last:
            return ids[:-1]
        return [*ids, self._ROLE_IDS["assistant"]] if asks else ids

    def closed_chat(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> list[int]:
        """Return the chat's ids up to the end of its last turn, an assistant's."""
        return self._turns(checked(messages, closes_last=True), tools)

    def _turns(self, chat: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        ids = [self._BOS]
        for message in prompted(chat, tools):
            ids += [self._ROLE_IDS[message["role"]], *message["content"].encode(), self._EOS]
        return ids

    def save(self, folder: Path) -> None:
        """Write the file by which `load` knows that the folder's model speaks bytes."""
        (folder / TOY_FILE).write_text('{"tokenizer": "bytes"}\n', encoding="utf-8")
