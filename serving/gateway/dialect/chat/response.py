"""A chat's answer at once, and the log-probabilities of its tokens.

    chat_completion   GenerateChunks, all -> ChatCompletion

A key that is absent and a key that is null differ to some clients; these shapes are the ones that
every client we know reads without harm.
"""

from collections.abc import Iterable
from typing import Any, Literal

from serving.gateway.dialect.chunks import (
    Chunks,
    Identity,
    Usage,
    by_choice,
    finish_reason,
    finite_logprob,
    token_text,
    usage,
)
from serving.gateway.dialect.fields import Described
from serving.proto import inference_pb2


class TopLogprob(Described):
    """A token, and how likely it was."""

    token: str
    """Its text; U+FFFD where that is only a piece of a character."""
    token_id: int
    """Its id, which Mistral's client needs."""
    logprob: float
    """The natural logarithm of its probability."""
    bytes: list[int]
    """Its bytes."""


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]
    """The likeliest tokens in its place, likeliest first."""


class Logprobs(Described):
    """The log-probabilities that were asked for with `logprobs`."""

    content: list[TokenLogprob]
    """The tokens in order."""


class AssistantMessage(Described):
    """The answer of a completion."""

    role: Literal["assistant"] = "assistant"
    """Always `assistant`."""
    content: str
    """The text, never null."""
    tool_calls: None = None
    """No tools for now."""


class Choice(Described):
    """One answer."""

    index: int
    """Its place among the choices."""
    message: AssistantMessage
    """The answer."""
    finish_reason: str
    """`stop` or `length`."""
    logprobs: Logprobs | None = None
    """Log-probabilities of the same tokens, where they were asked for."""


class ChatCompletion(Described):
    """The whole answer at once."""

    id: str
    """32 hexadecimal digits."""
    object: Literal["chat.completion"] = "chat.completion"
    """Always `chat.completion`."""
    created: int
    """Seconds since 1970."""
    model: str
    """The name of the served model, whatever name was asked for."""
    choices: list[Choice]
    """As many as were asked for, in order."""
    usage: Usage
    """Tokens spent."""


def chat_completion(identity: Identity, chunks: Chunks) -> ChatCompletion:
    """Returns the answer that the chunks make up; the last one of them ends it."""
    return ChatCompletion(
        id=identity.id,
        created=identity.created,
        model=identity.model,
        choices=[
            Choice(
                index=index,
                message=AssistantMessage(content="".join(chunk.text for chunk in own)),
                finish_reason=finish_reason(own[-1]),
                logprobs=_logprobs(own),
            )
            for index, own in by_choice(chunks)
        ],
        usage=usage(chunks[-1]),
    )


def chat_logprobs(chunk: inference_pb2.GenerateChunk) -> list[dict[str, Any]]:
    """Returns the log-probabilities of a chunk's tokens, each as a `TokenLogprob`'s fields."""
    return [
        _logprob(token) | {"top_logprobs": [_logprob(top) for top in token.top]}
        for token in chunk.logprobs
    ]


def _logprobs(chunks: Iterable[inference_pb2.GenerateChunk]) -> Logprobs | None:
    content = [logprob for chunk in chunks for logprob in chat_logprobs(chunk)]
    return Logprobs.model_validate({"content": content}) if content else None


def _logprob(token: inference_pb2.TokenLogprob) -> dict[str, Any]:
    return {
        "token": token_text(token),
        "token_id": token.token_id,
        "logprob": finite_logprob(token),
        "bytes": list(token.token),
    }
