"""The service's chunks, read for answers of every kind: who an answer is, how it ended, its tokens.

Answers at once are written in each kind's response.py, answers as a stream in its stream.py.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from serving.gateway.dialect.fields import Described
from serving.proto import inference_pb2

# JSON has no infinity. OpenAI's API writes this logarithm for a token without a probability.
_LOWEST_LOGPROB = -9999.0
_FINISH_REASONS = {
    number: name.removeprefix("FINISH_REASON_").lower()
    for name, number in inference_pb2.FinishReason.items()
}

Chunks = Sequence[inference_pb2.GenerateChunk]


class Usage(Described):
    """Tokens spent. Integers only: some clients add all the values up."""

    prompt_tokens: int
    """Tokens of the rendered conversation."""
    completion_tokens: int
    """Tokens generated."""
    total_tokens: int
    """The sum of both."""


@dataclass(frozen=True)
class Identity:
    """The fields that all pieces of one answer share.

    Attributes:
        id: The request's id, 32 hexadecimal digits, behind the vendor's prefix if it has one.
        created: Seconds since 1970.
        model: The served name.
    """

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, model: str, request_id: str | None = None) -> "Identity":
        """Returns the identity of an answer that begins now, under the request's id if it has one.

        Args:
            model: The served name.
            request_id: The answer's id; 32 random hexadecimal digits if absent.
        """
        return cls(request_id or uuid.uuid4().hex, int(time.time()), model)


def finish_reason(chunk: inference_pb2.GenerateChunk) -> str:
    """Returns why the choice ended, in OpenAI's words: `stop` or `length`."""
    return _FINISH_REASONS[chunk.finish_reason]


def usage(chunk: inference_pb2.GenerateChunk) -> Usage:
    """Returns the tokens spent, which the last chunk of an answer carries."""
    prompt, generated = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)


def finite_logprob(token: inference_pb2.TokenLogprob) -> float:
    """Returns a token's natural log-probability, or -9999 where it is lower."""
    return max(token.logprob, _LOWEST_LOGPROB)
