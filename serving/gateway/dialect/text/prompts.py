"""Prompts that the answer to a text completion repeats: their texts and log-probabilities.

The service tells of a prompt in the chunks before its first token: the pieces of its text in the
first one, then the log-probabilities of its tokens. All choices of a prompt repeat the same.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serving.gateway.dialect.text.logprobs import TextPosition, text_logprobs, token_name
from serving.proto import inference_pb2


@dataclass(frozen=True)
class Repeated:
    """The parts of its prompts that an answer repeats.

    Attributes:
        texts: Of each prompt, its text; None of one that was given as ids.
        choices: The number of choices of each prompt.
        is_echoed: Whether choices begin with their prompt, as `echo` asks.
        logprobs: The number of likeliest tokens beside those of an echoed prompt; None for no
            log-probabilities of it.
        prompt_logprobs: The same for vLLM's `prompt_logprobs`.
    """

    texts: Sequence[str | None]
    choices: int = 1
    is_echoed: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass
class PromptNews:
    """The news that one chunk has of an echoed prompt."""

    text: str
    columns: dict[str, list[Any]] | None


class EchoedPrompt:
    """Reads what chunks tell of one echoed prompt.

    Args:
        text: The prompt, where it was given as a text.
        logprobs: See `Repeated`.
    """

    def __init__(self, text: str | None, logprobs: int | None) -> None:
        self._text = text
        self._logprobs = logprobs
        self._pieces: Sequence[bytes] = ()
        self._position = TextPosition()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_read = 0  # tokens whose text was told
        self.length = 0
        """Characters of the text; known as soon as the pieces are."""

    def read(self, chunk: inference_pb2.GenerateChunk) -> PromptNews | None:
        """Returns what a chunk adds; None for nothing. Its text in all is the prompt."""
        if chunk.prompt_pieces:
            self._pieces = list(chunk.prompt_pieces)
            whole = b"".join(self._pieces).decode("utf-8", "replace")
            if self._logprobs is None:
                text = whole if self._text is None else self._text
                self.length = len(text)
                return PromptNews(text, None)
            self.length = len(whole)
            first = inference_pb2.TokenLogprob(token=self._pieces[0])
            columns: dict[str, list[Any]] = {
                "tokens": [token_name(first)],
                "token_logprobs": [None],
                "top_logprobs": [None],
                "text_offset": [],
            }
            return self._told(columns)
        if self._logprobs is None or not chunk.prompt_logprobs:
            return None
        known = inference_pb2.GenerateChunk(logprobs=chunk.prompt_logprobs)
        for token in known.logprobs:
            del token.top[self._logprobs :]
        return self._told(text_logprobs(known))

    def _told(self, columns: dict[str, list[Any]]) -> PromptNews:
        """Returns columns with their offsets, and the text of their tokens."""
        begin, self._num_read = self._num_read, self._num_read + len(columns["tokens"])
        pieces = self._pieces[begin : self._num_read]
        columns["text_offset"] = [self._position.advance(piece) for piece in pieces]
        is_all = self._num_read == len(self._pieces)
        return PromptNews(self._decoder.decode(b"".join(pieces), is_all), columns)
