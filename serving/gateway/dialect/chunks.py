"""The service's chunks, read for answers of every kind: who an answer is, how it ended, its tokens.

Answers at once are written in each kind's response.py, answers as a stream in its stream.py.
"""

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pydantic import Field

from serving.errors import ModelNotFound
from serving.gateway.dialect.fields import Described, is_none
from serving.proto import inference_pb2

# JSON has no infinity. OpenAI's API writes this logarithm for a token without a probability.
_LOWEST_LOGPROB = -9999.0
_FINISH_REASONS = {
    number: name.removeprefix("FINISH_REASON_").lower()
    for name, number in inference_pb2.FinishReason.items()
}

Chunks = Sequence[inference_pb2.GenerateChunk]


class PromptTokensDetails(Described):
    """Kinds of a prompt's tokens."""

    cached_tokens: int
    """Tokens that an earlier prompt of the caller had computed."""


class CompletionTokensDetails(Described):
    """Kinds of the tokens that were generated or guessed."""

    accepted_prediction_tokens: int
    """Tokens of the answer that were guessed before they were drawn."""
    rejected_prediction_tokens: int
    """Guesses that were checked in vain; they are no part of `completion_tokens`."""


class Usage(Described):
    """Tokens spent. Integers only on Azure's paths: some clients add all the values up."""

    prompt_tokens: int
    """Tokens of the rendered conversation."""
    completion_tokens: int
    """Tokens generated."""
    total_tokens: int
    """The sum of both."""
    prompt_tokens_details: PromptTokensDetails | None = Field(default=None, exclude_if=is_none)
    """OpenAI's, on the paths of its clients, with `--usage-details`."""
    completion_tokens_details: CompletionTokensDetails | None = Field(
        default=None, exclude_if=is_none
    )
    """OpenAI's, likewise, where something was guessed."""


@dataclass(frozen=True)
class Identity:
    """The fields that all pieces of one answer share.

    Attributes:
        id: The request's id, 32 hexadecimal digits, behind the vendor's prefix if it has one.
        created: Seconds since 1970.
        model: The name of the served model, or of the adapter that answers.
        tells_cached: Whether its usage tells the cached tokens of the prompt.
        is_openai: Whether an error in mid-stream has OpenAI's shape.
        returns_ids: Whether it has the ids of its tokens, as vLLM's `return_token_ids` asks.
        prompt_ids: Then the ids of the first prompt, which is a chat's only one.
    """

    id: str
    created: int
    model: str
    tells_cached: bool = False
    is_openai: bool = False
    returns_ids: bool = False
    prompt_ids: tuple[int, ...] = ()

    @classmethod
    def new(
        cls,
        model: str,
        request_id: str | None = None,
        *,
        tells_cached: bool = False,
        is_openai: bool = False,
    ) -> "Identity":
        """Returns the identity of an answer that begins now, under the request's id if it has one.

        Args:
            model: The served name.
            request_id: The answer's id; 32 random hexadecimal digits if absent.
            tells_cached: Whether its usage tells the cached tokens of the prompt.
            is_openai: Whether an error in mid-stream has OpenAI's shape.
        """
        answer_id = request_id or uuid.uuid4().hex
        return cls(answer_id, int(time.time()), model, tells_cached, is_openai)

    def telling_ids(self, chunks: Chunks) -> "Identity":
        """Returns the identity of an answer with ids, of which these are the first chunks."""
        ids = next((chunk.prompt_ids for chunk in chunks if chunk.prompt_ids), ())
        return replace(self, returns_ids=True, prompt_ids=tuple(ids))

    def answered_by(self, adapter: str | None, asked: str | None) -> "Identity":
        """Returns the identity of the answer, now that it is known who answers.

        Args:
            adapter: The adapter that answers, "" for the model without one; None where the service
                is older than adapters, and has not read the name that was asked for.
            asked: The name that was asked for, if there was one.

        Raises:
            ModelNotFound: Such a service was asked for another name than its model's.
        """
        if adapter is None and asked and asked != self.model:
            raise ModelNotFound.of(asked, self.model)
        return replace(self, model=adapter) if adapter else self


def id_list(ids: Iterable[int]) -> str:
    """Returns token ids as the inside of a JSON list."""
    return ",".join(map(str, ids))


def finish_reason(chunk: inference_pb2.GenerateChunk) -> str:
    """Returns why the choice ended, in OpenAI's words: `stop` or `length`."""
    return _FINISH_REASONS[chunk.finish_reason]


def usage(chunk: inference_pb2.GenerateChunk, *, tells_cached: bool = False) -> Usage:
    """Returns the tokens spent, which the last chunk of an answer carries.

    Args:
        chunk: The last chunk.
        tells_cached: Whether the cached tokens of the prompt, and the guesses, are told.
    """
    prompt, generated = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
    details = PromptTokensDetails(cached_tokens=chunk.usage.cached_tokens)
    accepted, rejected = chunk.usage.accepted_guesses, chunk.usage.rejected_guesses
    guesses: CompletionTokensDetails | None = None
    if tells_cached and (accepted or rejected):
        guesses = CompletionTokensDetails(
            accepted_prediction_tokens=accepted, rejected_prediction_tokens=rejected
        )
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=generated,
        total_tokens=prompt + generated,
        prompt_tokens_details=details if tells_cached else None,
        completion_tokens_details=guesses,
    )


def finite_logprob(token: inference_pb2.TokenLogprob) -> float:
    """Returns a token's natural log-probability, or -9999 where it is lower."""
    return max(token.logprob, _LOWEST_LOGPROB)
