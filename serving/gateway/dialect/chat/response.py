"""Answers at once: completions, models and errors, built from the proto in the types of `wire`.

    model_info        ModelInfo (proto)   -> ModelInfo
    model_card        ModelInfo (proto)   -> ModelCard
    chat_completion   GenerateChunks, all -> ChatCompletion
    text_completion   GenerateChunks, all -> TextCompletion
    error_body        ServingError        -> ErrorBody

What comes as a stream is the matter of `events`.
"""

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from serving.errors import InvalidParameter, Problem, ServingError
from serving.gateway.dialect import response_types as wire
from serving.proto import inference_pb2

# A value of a request is shown back in an error if its JSON has no more characters than this.
ECHO_LIMIT = 200
# JSON has no infinity; what has no probability has this logarithm, as OpenAI's API does it.
_LOWEST_LOGPROB = -9999.0
_FINISH_REASONS = {
    number: name.removeprefix("FINISH_REASON_").lower()
    for name, number in inference_pb2.FinishReason.items()
}

Chunks = Sequence[inference_pb2.GenerateChunk]


@dataclass(frozen=True)
class Identity:
    """What all parts of one answer share."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, model: str, request_id: str | None = None) -> "Identity":
        """The identity of an answer that begins now; it has the request's id if that has one."""
        return cls(request_id or uuid.uuid4().hex, int(time.time()), model)


def model_info(model: inference_pb2.ModelInfo, kind: str | None = None) -> wire.ModelInfo:
    """What is told about the model; `kind` stands in the place of its type if given."""
    return wire.ModelInfo(
        model_name=model.name, model_type=kind or model.type, model_provider_name=model.provider
    )


def model_card(model: inference_pb2.ModelInfo, created: int) -> wire.ModelCard:
    """The model in a list of models."""
    return wire.ModelCard(
        id=model.name,
        created=created,
        owned_by=model.provider,
        max_model_len=model.max_context,
        max_context_length=model.max_context,
    )


def chat_completion(identity: Identity, chunks: Chunks) -> wire.ChatCompletion:
    """The answer that the chunks, of which the last one ends it, make up."""
    return wire.ChatCompletion(
        id=identity.id,
        created=identity.created,
        model=identity.model,
        choices=[
            wire.Choice(
                index=index,
                message=wire.AssistantMessage(content="".join(chunk.text for chunk in own)),
                finish_reason=finish_reason(own[-1]),
                logprobs=_chat_logprobs(own),
            )
            for index, own in _by_choice(chunks)
        ],
        usage=usage(chunks[-1]),
    )


def text_completion(identity: Identity, chunks: Chunks) -> wire.TextCompletion:
    """The same for a text completion."""
    return wire.TextCompletion(
        id=identity.id,
        created=identity.created,
        model=identity.model,
        choices=[
            wire.TextChoice(
                text="".join(chunk.text for chunk in own),
                index=index,
                logprobs=_text_logprobs(own),
                finish_reason=finish_reason(own[-1]),
            )
            for index, own in _by_choice(chunks)
        ],
        usage=usage(chunks[-1]),
    )


def error_body(error: ServingError) -> wire.ErrorBody:
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
    inner = wire.ErrorDetail(code=error.azure_code, message=message, status=error.http_status)
    return wire.ErrorBody(error=inner, **inner.model_dump(), detail=detail)


def chat_logprobs(chunk: inference_pb2.GenerateChunk) -> list[dict[str, Any]]:
    """The logprobs of a chunk's tokens, as a chat has them."""
    return [
        _logprob(one) | {"top_logprobs": [_logprob(top) for top in one.top]}
        for one in chunk.logprobs
    ]


def text_logprobs(chunk: inference_pb2.GenerateChunk, offset: int) -> dict[str, list[Any]]:
    """The logprobs of tokens that begin at a character of the answer, as a text has them."""
    columns: dict[str, list[Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for one in chunk.logprobs:
        token = _text(one)
        columns["tokens"].append(token)
        columns["token_logprobs"].append(_finite(one.logprob))
        columns["top_logprobs"].append({_text(top): _finite(top.logprob) for top in one.top})
        columns["text_offset"].append(offset)
        offset += len(token)
    return columns


def finish_reason(chunk: inference_pb2.GenerateChunk) -> str:
    """Why the choice ended, in OpenAI's words."""
    return _FINISH_REASONS[chunk.finish_reason]


def usage(chunk: inference_pb2.GenerateChunk) -> wire.Usage:
    """The tokens spent, which the last chunk tells."""
    prompt, generated = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
    return wire.Usage(
        prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated
    )


def _by_choice(chunks: Chunks) -> list[tuple[int, list[inference_pb2.GenerateChunk]]]:
    of_choices: dict[int, list[inference_pb2.GenerateChunk]] = {}
    for chunk in chunks:
        of_choices.setdefault(chunk.choice, []).append(chunk)
    return sorted(of_choices.items())


def _chat_logprobs(chunks: Iterable[inference_pb2.GenerateChunk]) -> wire.Logprobs | None:
    content = [one for chunk in chunks for one in chat_logprobs(chunk)]
    return wire.Logprobs.model_validate({"content": content}) if content else None


def _text_logprobs(chunks: Iterable[inference_pb2.GenerateChunk]) -> wire.TextLogprobs | None:
    merged = inference_pb2.GenerateChunk()
    for chunk in chunks:
        merged.logprobs.extend(chunk.logprobs)
    return wire.TextLogprobs(**text_logprobs(merged, 0)) if merged.logprobs else None


def _logprob(one: inference_pb2.TokenLogprob) -> dict[str, Any]:
    return {
        "token": _text(one),
        "token_id": one.token_id,
        "logprob": _finite(one.logprob),
        "bytes": list(one.token),
    }


def _text(one: inference_pb2.TokenLogprob) -> str:
    return one.token.decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)


def _echo(value: object) -> object:
    try:
        return value if len(json.dumps(value, allow_nan=False)) <= ECHO_LIMIT else None
    except ValueError:  # infinity, or an integer too long to be written
        return None
