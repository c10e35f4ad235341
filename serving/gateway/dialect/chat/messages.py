"""The conversation of a chat request, as clients send it and as the model service wants it.

    conversation   Messages -> Chat (proto)

A message may carry whatever else a client stores in it (`name`, `index`, the fields of a delta that
it kept); what we do not know is ignored. Text comes as a string or as parts of type text. Tools and
other kinds of parts are refused by name.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
)
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.fields import NOT_HAD
from serving.proto import inference_pb2

# What Mistral's own endpoint puts before a conversation that asks for `safe_prompt`.
SAFETY_PROMPT = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid "
    "harmful, unethical, prejudiced, or negative content. Ensure replies promote fairness and "
    "positivity."
)

Role = Literal["system", "developer", "user", "assistant"]


class TextPart(BaseModel):
    """A part of a message's content; a text-only model reads no other kind."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: Literal["text"]
    """The kind of part."""
    text: str
    """What it says."""


def _spoken_role(role: object) -> object:
    if role in ("tool", "function"):
        raise PydanticCustomError(
            NOT_HAD,
            "tools are not supported yet: leave out messages of the role '{role}' and the calls "
            "that they answer",
            {"role": role},
        )
    return role


def _text_of(content: object) -> object:
    """Joins the parts of a message; a text-only model must refuse the other kinds by name."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError(
                NOT_HAD,
                "this model reads text only, not content of type '{kind}'",
                {"kind": str(kind)[:40]},
            )
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("string_type", "a part of type 'text' needs a string 'text'")
        texts.append(part["text"])
    return "\n".join(texts)


def _present(content: str | None, info: ValidationInfo) -> str | None:
    role = info.data.get("role")
    if content is None and role not in (None, "assistant"):
        raise PydanticCustomError(
            "missing", "a message of the role {role} needs a content", {"role": role}
        )
    return content


def _no_calls(calls: list[Any] | None) -> list[Any] | None:
    if calls:
        raise PydanticCustomError(
            NOT_HAD,
            "tools are not supported yet: leave out the tool_calls of earlier messages, and the "
            "messages of the role 'tool' that answer them",
        )
    return calls


class Message(BaseModel):
    """One turn of the conversation."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    role: Annotated[Role, BeforeValidator(_spoken_role, json_schema_input_type=Role)]
    """`developer` is OpenAI's newer name for `system`."""
    content: Annotated[
        str | None,
        BeforeValidator(_text_of, json_schema_input_type=str | list[TextPart] | None),
        AfterValidator(_present),
    ] = Field(default=None, validate_default=True)
    """A string, or a list of parts of type text. Only an assistant may leave it out."""
    tool_calls: Annotated[list[Any] | None, AfterValidator(_no_calls)] = None
    """Calls of tools that the assistant asked for; none for now."""
    prefix: bool | None = None
    """Mistral's, of the last message, an assistant's: the answer goes on from there."""


def ordered(messages: list[Message]) -> list[Message]:
    """Checks what no message can know of itself: where a prefix may stand."""
    for place, message in enumerate(messages):
        is_last_word = place == len(messages) - 1 and message.role == "assistant"
        if message.prefix and not is_last_word:
            raise PydanticCustomError(
                "prefix_misplaced", "prefix is for the last message, and of the role assistant"
            )
    return messages


def conversation(messages: Sequence[Message], *, is_safe: bool) -> inference_pb2.Chat:
    """The chat, begun with Mistral's safety prompt if it is to be safe."""
    said = [
        inference_pb2.ChatMessage(
            role="system" if message.role == "developer" else message.role,
            content=message.content or "",
        )
        for message in messages
    ]
    if is_safe and said[0].role == "system":  # one system message is all that some models take
        said[0].content = f"{SAFETY_PROMPT}\n\n{said[0].content}"
    elif is_safe:
        said.insert(0, inference_pb2.ChatMessage(role="system", content=SAFETY_PROMPT))
    return inference_pb2.Chat(messages=said, continue_last=bool(messages[-1].prefix))
