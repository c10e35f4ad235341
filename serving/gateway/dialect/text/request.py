"""OpenAI's text completions: what clients send, and its translation into the proto.

    read_completion   bytes             -> CompletionRequest, or the error that names what is wrong
    to_protos         CompletionRequest -> one GenerateRequest for each prompt

A prompt is continued as it is, without a chat template. Several prompts are answered together: the
choices of the first one come first.
"""

from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.fields import Parameters, TokenId, only
from serving.gateway.dialect.parsing import checked, json_object
from serving.proto import inference_pb2

# Each prompt is a call of its own to the model service.
MAX_PROMPTS = 16
# OpenAI's, for where the request says nothing.
DEFAULT_MAX_TOKENS = 16
DEFAULT_TEMPERATURE = 1.0

Prompt = str | Annotated[list[TokenId], Field(min_length=1)]


def _prompts(value: object) -> object:
    """A list of prompts, whichever of OpenAI's four forms it has."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if value and all(isinstance(item, int) for item in value):
            return [value]
        if all(isinstance(item, (str, list)) for item in value):
            return value
    raise PydanticCustomError(
        "prompt_type", "prompt must be a text, a list of token ids, or a list of either"
    )


class CompletionRequest(Parameters):
    """The body of a text completion request."""

    prompt: Annotated[
        list[Prompt],
        BeforeValidator(_prompts, json_schema_input_type=Prompt | list[Prompt]),
        Field(min_length=1, max_length=MAX_PROMPTS),
    ]
    """A text to be continued, the ids of its tokens, or a list of either."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Returns the log probability of each token, and of so many of the likeliest."""
    echo: Annotated[bool | None, only(False)] = None
    """Whether the answer repeats the prompt; not for now."""
    suffix: Annotated[str | None, only("")] = None
    """What follows the answer; not for now."""
    best_of: Annotated[int | None, only(1)] = None
    """Choices to choose from; not for now."""


def read_completion(body: bytes) -> CompletionRequest:
    """Reads a request; raises InvalidRequest, InvalidParameter or UnsupportedParameter."""
    return checked(CompletionRequest, json_object(body, "prompt"))


def to_protos(completion: CompletionRequest) -> list[inference_pb2.GenerateRequest]:
    """What the model service is asked, prompt by prompt."""
    return [_to_proto(completion, prompt) for prompt in completion.prompt]


def _to_proto(
    completion: CompletionRequest, prompt: str | list[int]
) -> inference_pb2.GenerateRequest:
    request = completion.to_proto()
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    if completion.max_tokens is None:
        request.max_tokens = DEFAULT_MAX_TOKENS
    if completion.temperature is None:
        request.sampling.temperature = DEFAULT_TEMPERATURE
    if completion.logprobs is not None:
        request.top_logprobs = completion.logprobs
    return request
