"""The types of what clients read: completions, the chunks of a stream, models, errors.

The shapes are the ones that every client we know reads without harm; a key that is absent and a key
that is null differ to some of them. Chunks are written by `events`, which does without these types
for the sake of speed; a test holds both to the same bytes.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Described(BaseModel):
    """A type whose attributes' docstrings are their descriptions in the OpenAPI document."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


def _is_none(value: object) -> bool:
    """Of the keys that must be absent, not null, where they have no value."""
    return value is None


class ModelInfo(Described):
    """The answer of /info."""

    model_name: str
    """The served name."""
    model_type: str
    """What it is good for: `chat-completions`."""
    model_provider_name: str
    """Who made it."""


class Usage(Described):
    """Tokens spent. Integers only: some clients add all the values up."""

    prompt_tokens: int
    """Tokens of the rendered conversation."""
    completion_tokens: int
    """Tokens generated."""
    total_tokens: int
    """The sum of both."""


class TopLogprob(Described):
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


class Logprobs(Described):
    """What was asked for with `logprobs`."""

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
    """Where they were asked for, of the same tokens."""


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


class Delta(Described):
    """What a chunk adds."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=_is_none)
    """In the first chunk only."""
    content: str
    """The new text; empty in the first and the last chunk, never null."""


class ChunkChoice(Described):
    """The news of one answer."""

    index: int
    """Its place among the choices."""
    delta: Delta
    """What is new."""
    finish_reason: str | None = None
    """`stop` or `length` in the last chunk, null before."""
    logprobs: Logprobs | None = None
    """Where they were asked for, of the same tokens."""


class ErrorDetail(Described):
    """An error as Azure's and OpenAI's clients look for it."""

    code: str
    """A name for programs."""
    message: str
    """What is wrong and what to do; JSON itself where the status is 422."""
    status: int
    """The HTTP status."""


class ChatCompletionChunk(Described):
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


class ErrorBody(Described):
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


class TextLogprobs(Described):
    """The log probabilities of a text completion: lists with an entry for each token."""

    tokens: list[str]
    """Their texts."""
    token_logprobs: list[float]
    """The natural logarithms of their probabilities."""
    top_logprobs: list[dict[str, float]]
    """The likeliest in their places, text to logarithm."""
    text_offset: list[int]
    """Where they begin in the answer, in characters."""


class TextChoice(Described):
    """One continuation of a prompt, or a piece of one in a stream."""

    text: str
    """What follows the prompt."""
    index: int
    """Its place among the choices; those of the first prompt come first."""
    logprobs: TextLogprobs | None = None
    """Where they were asked for."""
    finish_reason: str | None
    """`stop` or `length`; null in a stream until the last chunk."""


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
    usage: Usage | None = Field(default=None, exclude_if=_is_none)
    """Tokens spent; in a stream in one chunk at the end."""
    error: ErrorDetail | None = Field(default=None, exclude_if=_is_none)
    """Why the stream breaks off after this chunk."""


class Capabilities(Described):
    """What the model can do, as Mistral's client wants to know."""

    completion_chat: bool = True
    """Chats."""
    completion_fim: bool = False
    """Filling in the middle."""
    function_calling: bool = False
    """Tools."""
    fine_tuning: bool = False
    """Training through the API."""
    vision: bool = False
    """Images."""


class ModelCard(Described):
    """A model that is served, as OpenAI's and Mistral's clients list it."""

    id: str
    """The served name."""
    object: Literal["model"] = "model"
    """Always `model`."""
    created: int
    """Seconds since 1970: when the gateway was started."""
    owned_by: str
    """Who made it."""
    max_model_len: int
    """Tokens that prompt and answer may hold together; vLLM's name."""
    max_context_length: int
    """The same; Mistral's name."""
    type: Literal["base"] = "base"
    """Always `base`."""
    capabilities: Capabilities = Capabilities()
    """What it can do."""


class ModelList(Described):
    """The models that are served: one."""

    object: Literal["list"] = "list"
    """Always `list`."""
    data: list[ModelCard]
    """The models."""


class Status(Described):
    """The answer of a health check."""

    status: str
    """`live` or `ready`."""
