"""The conversation of a chat request, from clients' messages to the model service's.

    conversation   Messages -> Chat (proto)

A message may carry whatever else a client stores in it (`name`, `index`, the fields of a delta that
it kept); fields that we do not know are ignored. Text comes as a string or as parts of type text.
Other kinds of parts are refused by name.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.fields import (
    MAX_TOOLS,
    NOT_SUPPORTED,
    Described,
    Name,
    Never,
    Text,
    join_texts,
)
from serving.proto import inference_pb2

# The types of parts that hold text, and the key of it; refusals are of earlier answers of OpenAI's.
_TEXTS = {"text": "text", "refusal": "refusal"}
# Characters of the id of a call. Some servers keep signatures of thoughts in theirs.
MAX_CALL_ID = 8192
# Mistral's own endpoint puts this before a conversation that asks for `safe_prompt`.
SAFETY_PROMPT = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid "
    "harmful, unethical, prejudiced, or negative content. Ensure replies promote fairness and "
    "positivity."
)

Role = Literal["system", "developer", "user", "assistant", "tool"]
CallId = Annotated[str, Field(max_length=MAX_CALL_ID)]


class TextPart(Described):
    """A part of a message's content; a text-only model reads no other kind."""

    type: Literal["text"]
    """The kind of part."""
    text: Text
    """The text of the part."""


def _check_role(role: object) -> object:
    if role == "function":
        raise PydanticCustomError(
            NOT_SUPPORTED,
            "messages of the role 'function' are not supported: send results in messages of the "
            "role 'tool', with the tool_call_id of their calls",
        )
    return role


def _join_texts(content: object) -> object:
    return join_texts(content, _TEXTS)


def _check_content(content: str | None, info: ValidationInfo) -> str | None:
    role = info.data.get("role")
    if content is None and role not in (None, "assistant", "tool"):
        raise PydanticCustomError(
            "missing", "a message of the role {role} needs a content", {"role": role}
        )
    return content


def _arguments(value: object) -> object:
    """Returns arguments as JSON, for clients of Mistral's send them as an object."""
    if not isinstance(value, dict):
        return "" if value is None else value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise PydanticCustomError("number", "a number of the arguments is out of range") from None


class CalledFunction(Described):
    """A function that the assistant called, and with what."""

    name: Name
    """The function's name."""
    arguments: Annotated[
        Text, BeforeValidator(_arguments, json_schema_input_type=str | dict[str, Any] | None)
    ] = ""
    """The arguments: JSON, or whatever the model wrote; Mistral's clients send an object."""


def _call_type(kind: object) -> object:
    if isinstance(kind, str) and kind != "function":
        raise PydanticCustomError(
            NOT_SUPPORTED, "calls of type '{kind}' are not supported", {"kind": kind[:40]}
        )
    return "function" if kind is None else kind


class ToolCall(Described):
    """A call of a tool in an earlier message."""

    id: CallId | None = None
    """The id that the call had: any text, the same in the message with its result."""
    type: Annotated[
        Literal["function"],
        BeforeValidator(_call_type, json_schema_input_type=Literal["function"] | None),
    ] = "function"
    """Always `function`."""
    function: CalledFunction
    """What was called."""

    def proto(self) -> inference_pb2.ToolCall:
        """Returns the call for the service."""
        return inference_pb2.ToolCall(
            id=self.id or "", name=self.function.name, arguments=self.function.arguments
        )


def _check_calls(calls: list[ToolCall] | None, info: ValidationInfo) -> list[ToolCall] | None:
    if calls and info.data.get("role") not in (None, "assistant"):
        raise PydanticCustomError("tool_calls", "only messages of the role assistant call tools")
    return calls


def _check_call_id(call_id: str | None, info: ValidationInfo) -> str | None:
    if not call_id and info.data.get("role") == "tool":
        raise PydanticCustomError(
            "missing", "a message of the role tool needs the tool_call_id of the call it answers"
        )
    return call_id


class Message(Described):
    """One turn of the conversation."""

    role: Annotated[Role, BeforeValidator(_check_role, json_schema_input_type=Role)]
    """`developer` is OpenAI's newer name for `system`."""
    content: Annotated[
        Text | None,
        BeforeValidator(_join_texts, json_schema_input_type=str | list[TextPart] | None),
        AfterValidator(_check_content),
    ] = Field(default=None, validate_default=True)
    """A string, or a list of parts of type text. An assistant's and a tool's may lack it."""
    refusal: Text | None = None
    """OpenAI's, of an assistant: stands in the place of an absent content."""
    tool_calls: Annotated[
        Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None,
        AfterValidator(_check_calls),
    ] = None
    """What the assistant called, beside its content or in place of it."""
    tool_call_id: Annotated[CallId | None, AfterValidator(_check_call_id)] = Field(
        default=None, validate_default=True
    )
    """Of the role tool: the id of the call whose result the content is."""
    function_call: Never = None
    """OpenAI's older name for `tool_calls`; not supported."""
    audio: Never = None
    """OpenAI's, of a spoken answer; not supported."""
    prefix: bool | None = None
    """Mistral's, of the last message, an assistant's: the answer goes on from there."""

    def proto(self) -> inference_pb2.ChatMessage:
        """Returns the message for the service."""
        content = self.refusal if self.content is None else self.content
        is_result = self.role == "tool"
        return inference_pb2.ChatMessage(
            role="system" if self.role == "developer" else self.role,
            content=content or "",
            tool_calls=[call.proto() for call in self.tool_calls or []],
            tool_call_id=(self.tool_call_id or "") if is_result else "",
        )


class Prediction(Described):
    """A text that the answer may repeat."""

    type: Literal["content"]
    """The kind of guess."""
    content: Annotated[
        Text, BeforeValidator(_join_texts, json_schema_input_type=str | list[TextPart])
    ]
    """A string, or a list of parts of type text."""


def check_order(messages: list[Message]) -> list[Message]:
    """Returns the messages; refuses a `prefix` that is not the last message, an assistant's."""
    for place, message in enumerate(messages):
        may_be_prefix = place == len(messages) - 1 and message.role == "assistant"
        if message.prefix and not may_be_prefix:
            raise PydanticCustomError(
                "prefix_misplaced", "prefix is for the last message, and of the role assistant"
            )
    return messages


def conversation(messages: Sequence[Message], *, is_safe: bool) -> inference_pb2.Chat:
    """Returns the chat, which begins with Mistral's safety prompt if `is_safe`."""
    turns = [message.proto() for message in messages]
    if is_safe and turns[0].role == "system":  # one system message is all that some models take
        turns[0].content = f"{SAFETY_PROMPT}\n\n{turns[0].content}"
    elif is_safe:
        turns.insert(0, inference_pb2.ChatMessage(role="system", content=SAFETY_PROMPT))
    return inference_pb2.Chat(messages=turns, continue_last=bool(messages[-1].prefix))
