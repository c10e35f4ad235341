"""What clients send: the body of a chat request, and its translation into the proto.

    read_chat   bytes       -> ChatRequest, or the error that names what is wrong
    to_proto    ChatRequest -> GenerateRequest

The parameters are those of `parameters`, the messages those of `messages`; here is what only a chat
has, and the header of Azure's that says what happens to parameters outside its API.
"""

import enum
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from serving.errors import InvalidRequest
from serving.gateway.dialect.chat.messages import Message, conversation, ordered
from serving.gateway.dialect.fields import Never, Parameters, TokenCount, only
from serving.gateway.dialect.parsing import checked, forbidden, json_object, shortened
from serving.proto import inference_pb2

MAX_MESSAGES = 2048
# Parameters that a refusal lists; no client sends so many.
_MAX_LISTED = 32


class Extras(enum.Enum):
    """What happens to parameters outside Azure's list, as the header `extra-parameters` says."""

    REFUSE = "error"
    DROP = "drop"
    PASS = "pass-through"
    # No value of the header: clients of /v1 send what their own API has, and unasked.
    LENIENT = "lenient"

    @classmethod
    def from_header(cls, value: str | None) -> "Extras":
        """Raises InvalidRequest for a value that the header does not have."""
        # "allow" and "ignore" stand in older revisions of Microsoft's pages.
        names = {"error": cls.REFUSE, "drop": cls.DROP, "pass-through": cls.PASS}
        names |= {"allow": cls.PASS, "ignore": cls.DROP}
        policy = names.get((value or "error").strip().lower())
        if policy is None:
            raise InvalidRequest(
                f"the header extra-parameters is '{shortened(str(value))}'; it must be 'error', "
                "'drop' or 'pass-through'"
            )
        return policy


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
        list[Message], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(ordered)
    ]
    """The conversation, in the order in which it was said."""
    max_completion_tokens: TokenCount | None = None
    """OpenAI's newer name for `max_tokens`, which wins if both are given."""
    response_format: Annotated[
        str | None,
        BeforeValidator(_format_name, json_schema_input_type=dict[str, Any] | None),
        only("text"),
    ] = None
    """An object with a `type`; only `text` for now."""
    tools: Annotated[list[Any] | None, only([])] = None
    """Functions that the model may call; none for now."""
    tool_choice: Annotated[Any, only("none", "auto")] = None
    """Means nothing without tools."""
    functions: Annotated[list[Any] | None, only([])] = None
    """OpenAI's older name for `tools`."""
    function_call: Annotated[Any, only("none", "auto")] = None
    """OpenAI's older name for `tool_choice`."""
    modalities: Annotated[list[str] | None, only([], ["text"])] = None
    """What the answer is made of."""
    audio: Never = None
    """OpenAI's wishes for a spoken answer; not for now."""
    safe_prompt: bool | None = None
    """Mistral's: puts its safety prompt before the conversation."""
    logprobs: bool | None = None
    """Whether to return the log probability of each token."""
    top_logprobs: Annotated[
        Annotated[int, Field(ge=0, le=20)] | None, AfterValidator(_with_logprobs)
    ] = None
    """How many of the likeliest tokens to return beside it."""


# What Azure's API has, and what its linked notebooks and clients send to it unasked. All else must
# be asked for by the header, though we know it.
_AZURE = {
    *("messages", "model", "frequency_penalty", "presence_penalty", "temperature", "top_p"),
    *("max_tokens", "response_format", "stop", "stream", "tools", "tool_choice", "seed"),
    *("modalities", "safe_prompt", "random_seed", "stream_options", "max_completion_tokens"),
}


def read_chat(body: bytes, extras: Extras) -> ChatRequest:
    """Reads a request; raises InvalidRequest, InvalidParameter or UnsupportedParameter."""
    values = json_object(body, "messages")
    if extras is not Extras.LENIENT:
        values = _without_extras(values, extras)
    return checked(ChatRequest, values)


def _without_extras(values: dict[str, Any], extras: Extras) -> dict[str, Any]:
    extra = [name for name in values if name not in _AZURE]
    if extras is Extras.REFUSE and extra:
        # Microsoft's sentence to the letter: LiteLLM reads the list out of it and tries again.
        names = [shortened(name) for name in extra[:_MAX_LISTED]]
        raise InvalidRequest(
            f"Extra parameters {names!r} are not allowed when extra-parameters is not set or set "
            "to be 'error'. Set extra-parameters to 'pass-through' to pass to the model."
        )
    if extras is Extras.DROP:
        return {name: value for name, value in values.items() if name in _AZURE}
    if unknown := [name for name in extra if name not in ChatRequest.model_fields]:
        raise forbidden(unknown, values)
    return values


def to_proto(chat: ChatRequest) -> inference_pb2.GenerateRequest:
    """What the model service is asked; what the client left out stays absent."""
    request = chat.to_proto()
    request.chat.CopyFrom(conversation(chat.messages, is_safe=bool(chat.safe_prompt)))
    if chat.max_tokens is None and chat.max_completion_tokens is not None:
        request.max_tokens = chat.max_completion_tokens
    if chat.logprobs:
        request.top_logprobs = chat.top_logprobs or 0
    return request
