"""A text completion's answer at once, and the log-probabilities of its tokens.

TextAnswer   GenerateChunks, as they come -> the JSON of a TextCompletion
"""

import codecs
import json
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from serving.gateway.dialect.chunks import Usage, finite_logprob
from serving.gateway.dialect.error_body import ErrorDetail, OpenAIErrorDetail
from serving.gateway.dialect.fields import Described, is_none
from serving.gateway.dialect.whole import WholeAnswer, WholeChoice, encode
from serving.proto import inference_pb2


class TextLogprobs(Described):
    """The log-probabilities of a text completion: lists with an entry for each token."""

    tokens: list[str]
    r"""Their texts; a piece of a character is written as its bytes, such as bytes:\xe3."""
    token_logprobs: list[float]
    """The natural logarithms of their probabilities."""
    top_logprobs: list[dict[str, float]]
    """The likeliest tokens in their places, and the drawn ones, text to logarithm."""
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


class TextPosition:
    """The character of an answer at which its next token begins.

    A token may be a piece of a character. All pieces begin where their character does.
    """

    def __init__(self, character: int = 0) -> None:
        self._character = character
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def advance(self, token: bytes) -> int:
        """Returns where a token begins, and goes on to the next one."""
        begin = self._character
        self._character += len(self._decoder.decode(token))
        return begin


def text_logprobs(
    chunk: inference_pb2.GenerateChunk, offset: int = 0, position: TextPosition | None = None
) -> dict[str, list[Any]]:
    """Returns the log-probabilities of a chunk's tokens as the columns of `TextLogprobs`.

    Tokens that are pieces of characters are written as their bytes, so that each of several
    alternatives has a name of its own. Of alternatives with the same text the likeliest stays.

    Args:
        chunk: A chunk of one choice.
        offset: The character of the answer at which its first token begins.
        position: The same, kept from chunk to chunk of a stream; it is moved on.
    """
    position = position or TextPosition(offset)
    columns: dict[str, list[Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for token in chunk.logprobs:
        columns["tokens"].append(_token_name(token))
        columns["token_logprobs"].append(finite_logprob(token))
        likeliest: dict[str, float] = {}
        for top in token.top:
            name, logprob = _token_name(top), finite_logprob(top)
            likeliest[name] = max(logprob, likeliest.get(name, logprob))
        # OpenAI's lists always have the drawn token, so that they may have one entry more.
        likeliest.setdefault(columns["tokens"][-1], columns["token_logprobs"][-1])
        columns["top_logprobs"].append(likeliest)
        columns["text_offset"].append(position.advance(token.token))
    return columns


def _token_name(token: inference_pb2.TokenLogprob) -> str:
    r"""Returns a token's text, or its bytes as OpenAI's completions write them: bytes:\xe3."""
    try:
        return token.token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.token)


class TextPiece(WholeChoice):
    """Writes a `TextChoice`."""

    def __init__(self, index: int, *, tells_stop: bool = False) -> None:
        super().__init__(index, tells_stop=tells_stop)
        self._position = TextPosition()
        # The insides of the lists of `TextLogprobs`.
        self._columns = {name: bytearray() for name in TextLogprobs.model_fields}

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        return len(self.text) + sum(map(len, self._columns.values()))

    def add_logprobs(self, chunk: inference_pb2.GenerateChunk) -> None:
        """Writes the log-probabilities of a chunk, which has some."""
        for name, values in text_logprobs(chunk, position=self._position).items():
            column = self._columns[name]
            if column:
                column += b","
            written = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
            column += written[1:-1].encode()

    def pieces(self) -> Iterator[bytes | bytearray]:
        """Yields the choice as JSON."""
        yield b'{"text":"'
        yield self.text
        yield f'","index":{self.index},"logprobs":'.encode()
        if self._columns["tokens"]:
            opening = b"{"
            for name, column in self._columns.items():
                yield opening + f'"{name}":['.encode()
                yield column
                opening = b"],"
            yield b"]}"
        else:
            yield b"null"
        yield f',"finish_reason":{encode(self.reason)}{self.stop_reason}}}'.encode()


class TextAnswer(WholeAnswer):
    """Writes a `TextCompletion`."""

    kind = "text_completion"
    choice = TextPiece
