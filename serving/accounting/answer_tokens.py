"""What one answer of the model service comes to, counted while its chunks arrive."""

import time
from collections.abc import Callable

from serving.proto import inference_pb2


class Tally:
    """Counts what the service has sent, whether or not the client ever read it.

    Args:
        clock: The time, as time.monotonic() tells it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.finish_reasons: list[str] = []  # of the choices that have ended, in that order
        self.first_at: float | None = None  # when the first chunk came
        self.texts: dict[int, str] | None = None  # of each choice; set to {} to have them kept
        self._clock = clock

    def add(self, chunk: inference_pb2.GenerateChunk) -> None:
        """Counts the next chunk."""
        if self.first_at is None:
            self.first_at = self._clock()
        if chunk.HasField("prompt_tokens"):
            self.prompt_tokens = chunk.prompt_tokens
        self.completion_tokens += len(chunk.token_ids)
        if chunk.finish_reason:
            name = inference_pb2.FinishReason.Name(chunk.finish_reason)
            self.finish_reasons.append(name.removeprefix("FINISH_REASON_").lower())
        if chunk.HasField("usage"):  # the service's own sum, at the end
            self.prompt_tokens = chunk.usage.prompt_tokens
            self.completion_tokens = chunk.usage.completion_tokens
        if self.texts is not None:
            self.texts[chunk.choice] = self.texts.get(chunk.choice, "") + chunk.text
