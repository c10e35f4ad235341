"""The body of a chat request as clients send it, and its translation into the proto.

Fields of every kind of request stand in fields.py, the messages in messages.py; this file has those
that only a chat has.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.chat.messages import Message, check_order, conversation
from serving.gateway.dialect.fields import MAX_TOOLS, Name, Never, Parameters, TokenCount, only
from serving.proto import inference_pb2

MAX_MESSAGES = 2048
_MAX_MODALITIES = 4

Tools = Annotated[list[Any], Field(max_length=MAX_TOOLS)]


def _with_logprobs(count: int | None, info: ValidationInfo) -> int | None:
    if count and not info.data.get("logprobs"):
        raise PydanticCustomError("missing", "top_logprobs needs logprobs to be true")
    return count


def _format_name(value: object) -> object:
    # Early clients nest it once more: {"type": {"type": "text"}}.
    while isinstance(value, dict) and "type" in value:
        value = value["type"]
    return value


class ChatRequest(Parameters):
    """The body of a chat completion request."""

    messages: Annotated[
        list[Message],
        Field(min_length=1, max_length=MAX_MESSAGES),
        AfterValidator(check_order),
    ]
    """The conversation, in the order in which it was said."""
    max_completion_tokens: TokenCount | None = None
    """OpenAI's newer name for `max_tokens`, which wins if both are given."""
    response_format: Annotated[
        Name | None,
        BeforeValidator(_format_name, json_schema_input_type=dict[str, Any] | None),
        only("text"),
    ] = None
    """An object with a `type`; only `text` for now."""
    tools: Annotated[Tools | None, only([])] = None
    """Functions that the model may call; none for now."""
    tool_choice: Annotated[Any, only("none", "auto")] = None
    """Means nothing without tools."""
    functions: Annotated[Tools | None, only([])] = None
    """OpenAI's older name for `tools`."""
    function_call: Annotated[Any, only("none", "auto")] = None
    """OpenAI's older name for `tool_choice`."""
    modalities: Annotated[
        Annotated[list[Name], Field(max_length=_MAX_MODALITIES)] | None, only([], ["text"])
    ] = None
    """The forms that the answer may have; only `text` for now."""
    audio: Never = None
    """OpenAI's options of a spoken answer; not for now."""
    safe_prompt: bool | None = None
    """Mistral's: puts its safety prompt before the conversation."""
    logprobs: bool | None = None
    """Whether to return the log probability of each token."""
    top_logprobs: Annotated[
        Annotated[int, Field(ge=0, le=20)] | None, AfterValidator(_with_logprobs)
    ] = None
    """The number of likeliest tokens to return beside it."""

    def protos(self) -> list[inference_pb2.GenerateRequest]:
        """Returns the one call of the model service that answers the chat."""
        request = self.without_prompt()
        request.chat.CopyFrom(conversation(self.messages, is_safe=bool(self.safe_prompt)))
        if self.max_tokens is None and self.max_completion_tokens is not None:
            request.max_tokens = self.max_completion_tokens
        if self.logprobs:
            request.top_logprobs = self.top_logprobs or 0
        return [request]
