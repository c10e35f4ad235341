"""A text completion's answer at once, and the log-probabilities of its tokens.

TextAnswer   GenerateChunks, as they come -> the JSON of a TextCompletion
"""

import json
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from serving.gateway.dialect.chunks import Chunks, Identity, Usage, id_list
from serving.gateway.dialect.error_body import ErrorDetail, OpenAIErrorDetail
from serving.gateway.dialect.fields import Described, is_none
from serving.gateway.dialect.prompt_scores import PromptLogprobs, prompt_entries
from serving.gateway.dialect.text.logprobs import TextPosition, text_logprobs
from serving.gateway.dialect.text.prompts import EchoedPrompt, Repeated
from serving.gateway.dialect.whole import WholeAnswer, WholeChoice, encode
from serving.proto import inference_pb2


class TextLogprobs(Described):
    """The log-probabilities of a text completion: lists with an entry for each token."""

    tokens: list[str]
    r"""Their texts; a piece of a character is written as its bytes, such as bytes:\xe3."""
    token_logprobs: list[float | None]
    """The natural logarithms of their probabilities; null for the first of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    """The likeliest tokens in their places, and the drawn ones, text to logarithm; null
    for the first of an echoed prompt."""
    text_offset: list[int]
    """Where they begin in the answer, in characters."""


class TextChoice(Described):
    """One continuation of a prompt, or a piece of one in a stream."""

    text: str
    """The text that follows the prompt."""
    index: int
    """Its place among the choices; those of the first prompt come first."""
    logprobs: TextLogprobs | None = None
    """Log-probabilities of the tokens, where they were asked for."""
    finish_reason: str | None
    """`stop` or `length`; null in a stream until the last chunk."""
    stop_reason: str | int | None = Field(default=None, exclude_if=is_none)
    """vLLM's, on the paths of OpenAI's clients, in a stream in the last chunk: the text of `stop`
    or the id of `stop_token_ids` that ended it; null if neither did."""
    token_ids: list[int] | None = Field(default=None, exclude_if=is_none)
    """vLLM's: the ids of its tokens, where `return_token_ids` asked for them."""
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=is_none)
    """Those of its prompt, where it asked for them; in a stream in the first chunk."""
    prompt_logprobs: PromptLogprobs | None = Field(default=None, exclude_if=is_none)
    """Log-probabilities of the prompt's tokens, where `prompt_logprobs` asked for them; else null
    on the paths of OpenAI's clients, but for streams."""


class TextCompletion(Described):
    """The answer to a text completion request, or a chunk of it in a stream."""

    id: str
    """32 hexadecimal digits."""
    object: Literal["text_completion"] = "text_completion"
    """Always `text_completion`."""
    created: int
    """Seconds since 1970."""
    model: str
    """The name of the served model, whatever name was asked for."""
    choices: list[TextChoice]
    """As many as were asked for, in order; in a stream one, or none as in a chat's."""
    usage: Usage | None = Field(default=None, exclude_if=is_none)
    """Tokens spent; in a stream in one chunk at the end."""
    error: ErrorDetail | OpenAIErrorDetail | None = Field(default=None, exclude_if=is_none)
    """Why the stream breaks off after this chunk."""


class RepeatedPrompt:
    """One prompt as its choices repeat it, written while its chunks come.

    Args:
        repeated: What of it is repeated.
        place: Its place among the prompts.
    """

    def __init__(self, repeated: Repeated, place: int) -> None:
        self._repeated = repeated
        self._echoed: EchoedPrompt | None = None
        if repeated.is_echoed:
            self._echoed = EchoedPrompt(repeated.texts[place], repeated.logprobs)
        self.text = bytearray()  # the inside of a JSON string
        self.columns = {name: bytearray() for name in TextLogprobs.model_fields}
        self._ids: bytes | None = None
        self.entries = bytearray()  # of vLLM's `prompt_logprobs`, each behind a comma

    @property
    def length(self) -> int:
        """Characters of the text that is repeated."""
        return 0 if self._echoed is None else self._echoed.length

    @property
    def num_bytes(self) -> int:
        """Bytes that it adds to each choice."""
        ids = len(self._ids or b"")
        return len(self.text) + len(self.entries) + ids + sum(map(len, self.columns.values()))

    def add(self, chunk: inference_pb2.GenerateChunk) -> None:
        """Writes what a chunk tells of the prompt."""
        if chunk.prompt_ids:
            self._ids = id_list(chunk.prompt_ids).encode()
        if self._repeated.prompt_logprobs is not None and chunk.prompt_logprobs:
            self.entries += prompt_entries(chunk, self._repeated.prompt_logprobs)
        news = None if self._echoed is None else self._echoed.read(chunk)
        if news is not None:
            self.text += encode(news.text)[1:-1].encode()
            if news.columns is not None:
                add_columns(self.columns, news.columns)

    def members(self, *, is_openai: bool) -> Iterator[bytes | bytearray]:
        """Yields `prompt_logprobs` and `prompt_token_ids`, where they were asked for.

        Each has a comma before it.

        Args:
            is_openai: Whether `prompt_logprobs` is null where it was not asked for: vLLM's
                clients read the member without asking whether it is there.
        """
        if self._repeated.prompt_logprobs is not None:
            yield b',"prompt_logprobs":[null'
            yield self.entries
            yield b"]"
        elif is_openai:
            yield b',"prompt_logprobs":null'
        if self._ids is not None:
            yield b',"prompt_token_ids":['
            yield self._ids
            yield b"]"


def add_columns(written: dict[str, bytearray], columns: dict[str, list[Any]]) -> None:
    """Writes the columns of some tokens behind those that are written already."""
    for name, values in columns.items():
        column = written[name]
        if column and values:
            column += b","
        column += json.dumps(values, ensure_ascii=False, separators=(",", ":"))[1:-1].encode()


class TextPiece(WholeChoice):
    """Writes a `TextChoice`."""

    def __init__(self, index: int, prompt: RepeatedPrompt, *, tells_stop: bool = False) -> None:
        super().__init__(index, tells_stop=tells_stop)
        self._prompt = prompt
        self._position = TextPosition(prompt.length)
        # The insides of the lists of `TextLogprobs`.
        self._columns = {name: bytearray() for name in TextLogprobs.model_fields}

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        own = super().num_bytes + sum(map(len, self._columns.values()))
        return own + self._prompt.num_bytes

    def add_logprobs(self, chunk: inference_pb2.GenerateChunk) -> None:
        """Writes the log-probabilities of a chunk, which has some."""
        add_columns(self._columns, text_logprobs(chunk, position=self._position))

    def pieces(self) -> Iterator[bytes | bytearray]:
        """Yields the choice as JSON."""
        yield b'{"text":"'
        yield self._prompt.text
        yield self.text
        yield f'","index":{self.index},"logprobs":'.encode()
        before = self._prompt.columns
        if self._columns["tokens"] or before["tokens"]:
            opening = b"{"
            for name, column in self._columns.items():
                yield opening + f'"{name}":['.encode()
                yield before[name]
                if before[name] and column:
                    yield b","
                yield column
                opening = b"],"
            yield b"]}"
        else:
            yield b"null"
        yield f',"finish_reason":{encode(self.reason)}{self.members}'.encode()
        yield from self._prompt.members(is_openai=self._tells_stop)
        yield b"}"


class TextAnswer(WholeAnswer):
    """Writes a `TextCompletion`.

    Args:
        identity: The fields of the answer that are known before.
        repeated: What it repeats of its prompts; None for nothing.
    """

    kind = "text_completion"

    def __init__(self, identity: Identity, repeated: Repeated | None = None) -> None:
        super().__init__(identity)
        self._repeated = repeated or Repeated([])
        self._prompts: dict[int, RepeatedPrompt] = {}
        self.choice = self._text_piece

    def add(self, chunks: Chunks) -> None:
        """Writes chunks in the order in which they came; see `WholeAnswer.add`."""
        for chunk in chunks:
            if chunk.prompt_pieces or chunk.prompt_logprobs or chunk.prompt_ids:
                prompt = self._prompt(chunk.choice)
                before = prompt.num_bytes
                prompt.add(chunk)
                self._num_bytes += self._repeated.choices * (prompt.num_bytes - before)
        super().add(chunks)

    def _prompt(self, choice: int) -> RepeatedPrompt:
        place = choice // self._repeated.choices
        if place not in self._prompts:
            self._prompts[place] = RepeatedPrompt(self._repeated, place)
        return self._prompts[place]

    def _text_piece(self, index: int, *, tells_stop: bool) -> TextPiece:
        return TextPiece(index, self._prompt(index), tells_stop=tells_stop)
