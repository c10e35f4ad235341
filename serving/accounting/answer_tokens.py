"""The tokens of one answer of the model service, counted while its chunks arrive."""

import time
from collections.abc import Callable

from serving.proto import inference_pb2


class AnswerTokens:
    """Counts what the service has sent, whether or not the client ever reads it.

    Args:
        clock: Returns seconds, like time.monotonic.

    Attributes:
        prompt_tokens: Tokens of the rendered prompt; 0 until the service has sent the number.
        cached_tokens: Those of them that an earlier prompt had computed.
        completion_tokens: Tokens generated so far, of all choices.
        finish_reasons: `stop` or `length` of each choice that has ended, in that order.
        first_at: The clock at the first token; None before.
        adapter: The adapter that answers, "" for the model without one; None until the service has
            told it, and always of a service that is older than adapters.
        texts: The text of each choice by its number, if they are kept: set it to {} for that.
        on_rendered: Called with the number of the prompt's tokens as soon as it is known.
        on_more: Called when a chunk has been counted.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.finish_reasons: list[str] = []
        self.first_at: float | None = None
        self.adapter: str | None = None
        self.texts: dict[int, str] | None = None
        self.on_rendered: Callable[[int], None] | None = None
        self.on_more: Callable[[], None] | None = None
        self._computed_tokens = 0
        self._clock = clock

    @property
    def computed_prompt_tokens(self) -> int:
        """Tokens of the prompt that were computed so far; all of them from the first token on."""
        return self.prompt_tokens if self.completion_tokens else self._computed_tokens

    def add(self, chunk: inference_pb2.GenerateChunk) -> None:
        """Counts the next chunk."""
        if tokens := len(chunk.token_ids):
            self.completion_tokens += tokens
            if self.first_at is None:
                self.first_at = self._clock()
        elif chunk.computed_tokens:
            self._computed_tokens = chunk.computed_tokens
        if chunk.cached_tokens:
            self.cached_tokens = chunk.cached_tokens
        if self.adapter is None and chunk.HasField("adapter"):
            self.adapter = chunk.adapter
        if not self.prompt_tokens and chunk.HasField("prompt_tokens"):
            self.prompt_tokens = chunk.prompt_tokens
            if self.on_rendered is not None:
                self.on_rendered(chunk.prompt_tokens)
        if chunk.finish_reason:
            name = inference_pb2.FinishReason.Name(chunk.finish_reason)
            self.finish_reasons.append(name.removeprefix("FINISH_REASON_").lower())
            if chunk.HasField("usage"):  # the service's own sum, at the end
                self.prompt_tokens = chunk.usage.prompt_tokens
                self.cached_tokens = chunk.usage.cached_tokens
                self.completion_tokens = chunk.usage.completion_tokens
                if self._computed_tokens:  # without an answer the last token is left out
                    self._computed_tokens = self.prompt_tokens
        if self.texts is not None:
            self.texts[chunk.choice] = self.texts.get(chunk.choice, "") + chunk.text
        if self.on_more is not None:
            self.on_more()
