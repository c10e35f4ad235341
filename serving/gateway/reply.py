"""What clients read: completions, the events of a stream, errors; all built from the proto here.

    model_info    ModelInfo (proto)   -> ModelInfo
    completion    GenerateChunks, all -> ChatCompletion
    opening       (nothing yet)       -> the first ChatCompletionChunk of a choice
    chunks_of     GenerateChunk, one  -> ChatCompletionChunks
    heartbeat     (silence)           -> a ChatCompletionChunk that says nothing
    failure       ServingError        -> the ChatCompletionChunk that ends a broken stream
    error_body    ServingError        -> ErrorBody

The shapes are the ones that every client we know reads without harm. A stream is made of `data:`
lines and nothing else: Azure's clients refuse comments and named events, so that a heartbeat has to
be a chunk without choices. A key that is absent and a key that is null differ to some of them.
"""

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.errors import InvalidParameter, Problem, ServingError
from serving.proto import inference_pb2

# The end of a stream; .NET's client waits for it for ever.
DONE = b"data: [DONE]\n\n"
# A value of a request is shown back in an error if its JSON has no more characters than this.
ECHO_LIMIT = 200


def _is_none(value: object) -> bool:
    """Of the keys that must be absent, not null, where they have no value."""
    return value is None


class ModelInfo(BaseModel):
    """The answer of /info."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    """The served name."""
    model_type: str
    """What it is good for: `chat-completions`."""
    model_provider_name: str
    """Who made it."""


class Usage(BaseModel):
    """Tokens spent. Integers only: some clients add all the values up."""

    prompt_tokens: int
    """Tokens of the rendered conversation."""
    completion_tokens: int
    """Tokens generated."""
    total_tokens: int
    """The sum of both."""


class TopLogprob(BaseModel):
    """A token, and how likely it was."""

    token: str
    """Its text; U+FFFD where that is a part of a character."""
    token_id: int
    """Its id, which Mistral's client needs."""
    logprob: float
    """The natural logarithm of its probability."""
    bytes: list[int]
    """Its bytes."""


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]
    """The likeliest in its place, likeliest first."""


class Logprobs(BaseModel):
    """What was asked for with `logprobs`."""

    content: list[TokenLogprob]
    """The tokens in order."""


class AssistantMessage(BaseModel):
    """The answer of a completion."""

    role: Literal["assistant"] = "assistant"
    """Always `assistant`."""
    content: str
    """The text, never null."""
    tool_calls: None = None
    """No tools for now."""


class Choice(BaseModel):
    """One answer."""

    index: int
    """Its place among the choices."""
    message: AssistantMessage
    """The answer."""
    finish_reason: str
    """`stop` or `length`."""
    logprobs: Logprobs | None = None
    """Where they were asked for, of the same tokens."""


class ChatCompletion(BaseModel):
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


class Delta(BaseModel):
    """What a chunk adds."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=_is_none)
    """In the first chunk only."""
    content: str
    """The new text; empty in the first and the last chunk, never null."""


class ChunkChoice(BaseModel):
    """The news of one answer."""

    index: int
    """Its place among the choices."""
    delta: Delta
    """What is new."""
    finish_reason: str | None = None
    """`stop` or `length` in the last chunk, null before."""
    logprobs: Logprobs | None = None
    """Where they were asked for, of the same tokens."""


class ErrorDetail(BaseModel):
    """An error as Azure's and OpenAI's clients look for it."""

    code: str
    """A name for programs."""
    message: str
    """What is wrong and what to do; JSON itself where the status is 422."""
    status: int
    """The HTTP status."""


class ChatCompletionChunk(BaseModel):
    """One event of a stream."""

    id: str
    """32 hexadecimal digits, the same in all chunks."""
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    """Always `chat.completion.chunk`."""
    created: int
    """Seconds since 1970, the same in all chunks."""
    model: str
    """The name of the served model."""
    choices: list[ChunkChoice]
    """One choice; none in a heartbeat, a chunk of usage, a failure."""
    usage: Usage | None = Field(default=None, exclude_if=_is_none)
    """Tokens spent, in one chunk at the end."""
    error: ErrorDetail | None = Field(default=None, exclude_if=_is_none)
    """Why the stream breaks off after this chunk."""


class ErrorBody(BaseModel):
    """The body of every answer that is not 2xx; one shape for clients that look in other places."""

    error: ErrorDetail
    """Where most clients look."""
    status: int
    """The HTTP status."""
    code: str
    """The code again, for clients that look at the root."""
    message: str
    """The message again."""
    detail: str | list[dict[str, object]]
    """The message, or for 422 what is wrong with each parameter: `type`, `loc`, `msg`, `input`."""


@dataclass(frozen=True)
class Identity:
    """What all parts of one answer share."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, model: str) -> "Identity":
        """The identity of an answer that begins now."""
        return cls(uuid.uuid4().hex, int(time.time()), model)


def model_info(model: inference_pb2.ModelInfo) -> ModelInfo:
    """What is told about the model."""
    return ModelInfo(
        model_name=model.name, model_type=model.type, model_provider_name=model.provider
    )


def completion(identity: Identity, chunks: Iterable[inference_pb2.GenerateChunk]) -> ChatCompletion:
    """The answer that the chunks, of which the last one ends it, make up."""
    *_, last = chunks = list(chunks)
    of_choices: dict[int, list[inference_pb2.GenerateChunk]] = {}
    for chunk in chunks:
        of_choices.setdefault(chunk.choice, []).append(chunk)
    return ChatCompletion(
        id=identity.id,
        created=identity.created,
        model=identity.model,
        choices=[_choice(index, own) for index, own in sorted(of_choices.items())],
        usage=_usage(last),
    )


def opening(identity: Identity, index: int) -> ChatCompletionChunk:
    """The first chunk of a choice in a stream: the role, and no text yet."""
    return _chunk(identity, index, Delta(role="assistant", content=""))


def chunks_of(
    identity: Identity, chunk: inference_pb2.GenerateChunk, include_usage: bool
) -> Iterator[ChatCompletionChunk]:
    """What one chunk of the service becomes: none to three chunks.

    The usage comes with the last choice's reason to finish. A client of OpenAI's that asks for it
    has it in a chunk of its own and only there, because some add up whatever usage they meet.
    """
    logprobs = _logprobs([chunk])
    if chunk.text:
        yield _chunk(identity, chunk.choice, Delta(content=chunk.text), logprobs=logprobs)
        logprobs = None
    if chunk.finish_reason == inference_pb2.FINISH_REASON_UNSPECIFIED:
        return
    reason = _finish_reason(chunk)
    last = _chunk(identity, chunk.choice, Delta(content=""), reason, logprobs)
    if not chunk.HasField("usage"):
        yield last
        return
    if include_usage:
        yield last
        last = heartbeat(identity)
    last.usage = _usage(chunk)
    yield last


def heartbeat(identity: Identity) -> ChatCompletionChunk:
    """A chunk that only shows that the connection lives."""
    return ChatCompletionChunk(
        id=identity.id, created=identity.created, model=identity.model, choices=[]
    )


def failure(identity: Identity, error: ServingError) -> ChatCompletionChunk:
    """The chunk that tells why the stream breaks off."""
    chunk = heartbeat(identity)
    chunk.error = error_body(error).error
    return chunk


def event(chunk: ChatCompletionChunk) -> bytes:
    """A chunk as a server-sent event.

    All of it is ASCII: clients that split lines where Unicode does, or decode the network's pieces
    one by one, would break the text otherwise.
    """
    return b"data: " + chunk.model_dump_json(ensure_ascii=True).encode() + b"\n\n"


def error_body(error: ServingError) -> ErrorBody:
    """What a client reads when its request failed."""
    message = str(error)
    detail: str | list[dict[str, object]] = message
    if isinstance(error, InvalidParameter):
        problems = error.problems or (Problem(error.azure_code, ("body",), message, None),)
        detail = [
            {
                "type": problem.kind,
                "loc": list(problem.path),
                "msg": problem.message,
                "input": _echo(problem.value),
            }
            for problem in problems
        ]
        # LiteLLM reads the names of the parameters that it may drop out of the message.
        message = json.dumps({"detail": detail})
    inner = ErrorDetail(code=error.azure_code, message=message, status=error.http_status)
    return ErrorBody(error=inner, **inner.model_dump(), detail=detail)


def _choice(index: int, chunks: Sequence[inference_pb2.GenerateChunk]) -> Choice:
    return Choice(
        index=index,
        message=AssistantMessage(content="".join(chunk.text for chunk in chunks)),
        finish_reason=_finish_reason(chunks[-1]),
        logprobs=_logprobs(chunks),
    )


def _chunk(
    identity: Identity,
    index: int,
    delta: Delta,
    finish_reason: str | None = None,
    logprobs: Logprobs | None = None,
) -> ChatCompletionChunk:
    chunk = heartbeat(identity)
    news = ChunkChoice(index=index, delta=delta, finish_reason=finish_reason, logprobs=logprobs)
    chunk.choices = [news]
    return chunk


def _logprobs(chunks: Iterable[inference_pb2.GenerateChunk]) -> Logprobs | None:
    content = [
        TokenLogprob(**_logprob(one), top_logprobs=[TopLogprob(**_logprob(top)) for top in one.top])
        for chunk in chunks
        for one in chunk.logprobs
    ]
    return Logprobs(content=content) if content else None


def _logprob(one: inference_pb2.TokenLogprob) -> dict[str, Any]:
    return {
        "token": one.token.decode("utf-8", "replace"),
        "token_id": one.token_id,
        "logprob": one.logprob,
        "bytes": list(one.token),
    }


def _finish_reason(chunk: inference_pb2.GenerateChunk) -> str:
    name = inference_pb2.FinishReason.Name(chunk.finish_reason)
    return name.removeprefix("FINISH_REASON_").lower()


def _usage(chunk: inference_pb2.GenerateChunk) -> Usage:
    prompt, generated = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)


def _echo(value: object) -> object:
    try:
        return value if len(json.dumps(value, allow_nan=False)) <= ECHO_LIMIT else None
    except ValueError:  # infinity, or an integer too long to be written
        return None
