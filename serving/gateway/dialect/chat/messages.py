"""The conversation of a chat request, from clients' messages to the model service's.

    conversation   Messages -> Chat (proto)

A message may carry whatever else a client stores in it (`name`, `index`, the fields of a delta that
it kept); fields that we do not know are ignored. Text comes as a string or as parts of type text.
Tools and other kinds of parts are refused by name.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.fields import MAX_TOOLS, NOT_SUPPORTED, Described, Text
from serving.proto import inference_pb2

# Parts of one message's content.
MAX_PARTS = 1024
# Mistral's own endpoint puts this before a conversation that asks for `safe_prompt`.
SAFETY_PROMPT = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid "
    "harmful, unethical, prejudiced, or negative content. Ensure replies promote fairness and "
    "positivity."
)

Role = Literal["system", "developer", "user", "assistant"]


class TextPart(Described):
    """A part of a message's content; a text-only model reads no other kind."""

    type: Literal["text"]
    """The kind of part."""
    text: Text
    """The text of the part."""


def _check_role(role: object) -> object:
    if role in ("tool", "function"):
        raise PydanticCustomError(
            NOT_SUPPORTED,
            "tools are not supported yet: leave out messages of the role '{role}' and the calls "
            "that they answer",
            {"role": role},
        )
    return role


def _join_texts(content: object) -> object:
    """Joins the parts of a message; a text-only model must refuse the other kinds by name."""
    if not isinstance(content, list):
        return content
    if len(content) > MAX_PARTS:
        raise PydanticCustomError(
            "too_long", "a content has at most {most} parts", {"most": MAX_PARTS}
        )
    texts = []
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind != "text":
            raise PydanticCustomError(
                NOT_SUPPORTED,
                "this model reads text only, not content of type '{kind}'",
                # A list of a hundred thousand may stand here, which is not written out.
                {"kind": kind[:40] if isinstance(kind, str) else type(kind).__name__},
            )
        if not isinstance(item.get("text"), str):
            raise PydanticCustomError("string_type", "a part of type 'text' needs a string 'text'")
        texts.append(item["text"])
    return "\n".join(texts)


def _check_content(content: str | None, info: ValidationInfo) -> str | None:
    role = info.data.get("role")
    if content is None and role not in (None, "assistant"):
        raise PydanticCustomError(
            "missing", "a message of the role {role} needs a content", {"role": role}
        )
    return content


def _check_no_calls(calls: list[Any] | None) -> list[Any] | None:
    if calls:
        raise PydanticCustomError(
            NOT_SUPPORTED,
            "tools are not supported yet: leave out the tool_calls of earlier messages, and the "
            "messages of the role 'tool' that answer them",
        )
    return calls


class Message(Described):
    """One turn of the conversation."""

    role: Annotated[Role, BeforeValidator(_check_role, json_schema_input_type=Role)]
    """`developer` is OpenAI's newer name for `system`."""
    content: Annotated[
        Text | None,
        BeforeValidator(_join_texts, json_schema_input_type=str | list[TextPart] | None),
        AfterValidator(_check_content),
    ] = Field(default=None, validate_default=True)
    """A string, or a list of parts of type text. Only an assistant's message may lack it."""
    tool_calls: Annotated[
        Annotated[list[Any], Field(max_length=MAX_TOOLS)] | None, AfterValidator(_check_no_calls)
    ] = None
    """Calls of tools that the assistant asked for; none for now."""
    prefix: bool | None = None
    """Mistral's, of the last message, an assistant's: the answer goes on from there."""


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
    turns = [
        inference_pb2.ChatMessage(
            role="system" if message.role == "developer" else message.role,
            content=message.content or "",
        )
        for message in messages
    ]
    if is_safe and turns[0].role == "system":  # one system message is all that some models take
        turns[0].content = f"{SAFETY_PROMPT}\n\n{turns[0].content}"
    elif is_safe:
        turns.insert(0, inference_pb2.ChatMessage(role="system", content=SAFETY_PROMPT))
    return inference_pb2.Chat(messages=turns, continue_last=bool(messages[-1].prefix))
