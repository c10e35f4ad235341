"""The input of a request to the Responses API: items of a conversation, and what they mean here.

    conversation   Items -> the messages of a Chat (proto)

Calls of functions and their outputs are items of their own; in the proto calls belong to the
assistant's message before them. Fields of items that we do not know are ignored, as a client sends
back whatever an answer held. What a reasoning model has thought means nothing to another one, and
is left out.

https://platform.openai.com/docs/api-reference/responses/create#responses-create-input
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.fields import NOT_SUPPORTED, Described, Name, Text, join_texts
from serving.proto import inference_pb2

MAX_ITEMS = 4096

# The types of parts that hold text, and the key of it.
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
# Types of items that are read or left out; all others are refused by name.
_MESSAGE, _CALL, _OUTPUT, _REASONING = (
    *("message", "function_call", "function_call_output", "reasoning"),
)
ITEM_TYPES = (_MESSAGE, _CALL, _OUTPUT, _REASONING)


class InputText(Described):
    """A part of a message's content; a text-only model reads no other kind."""

    type: Literal["input_text", "output_text"]
    """Who has written it: the client or a model."""
    text: Text
    """The text of the part."""


def _join_texts(content: object) -> object:
    return join_texts(content, _TEXTS)


Content = Annotated[
    Text, BeforeValidator(_join_texts, json_schema_input_type=str | list[InputText])
]


class InputMessage(Described):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    """Always `message`; it may be left out."""
    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is OpenAI's newer name for `system`."""
    content: Content
    """A string, or a list of parts of text."""


class FunctionCall(Described):
    """A call of a function that an answer asked for."""

    type: Literal["function_call"]
    """Always `function_call`."""
    call_id: Name
    """The id that its output names."""
    name: Name
    """The name of the function."""
    arguments: Text
    """JSON, or whatever a model has written."""


class FunctionCallOutput(Described):
    """The result of a call, from the client."""

    type: Literal["function_call_output"]
    """Always `function_call_output`."""
    call_id: Name
    """The id of the call."""
    output: Content
    """A string, or a list of parts of text."""


class ReasoningItem(Described):
    """The reasoning of a model that reasons; it is left out."""

    type: Literal["reasoning"]
    """Always `reasoning`."""


def _type_of(item: Any) -> object:
    """Returns the type of an item, which is a message if it does not say."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return _MESSAGE if kind is None else kind


def _check_type(item: object) -> object:
    if not isinstance(item, dict):
        return item
    kind = _type_of(item)
    if kind not in ITEM_TYPES:
        raise PydanticCustomError(
            NOT_SUPPORTED,
            "input items of type '{kind}' are not supported; leave them out",
            {"kind": kind[:40] if isinstance(kind, str) else type(kind).__name__},
        )
    return item


Item = Annotated[
    Annotated[InputMessage, Tag(_MESSAGE)]
    | Annotated[FunctionCall, Tag(_CALL)]
    | Annotated[FunctionCallOutput, Tag(_OUTPUT)]
    | Annotated[ReasoningItem, Tag(_REASONING)],
    Discriminator(_type_of),
    BeforeValidator(_check_type),
]


def _as_items(value: object) -> object:
    """Returns a text as the user's message."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Input = Annotated[
    list[Item],
    Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True),
    BeforeValidator(_as_items, json_schema_input_type=str | list[Item]),
]


def conversation(items: Sequence[Any], instructions: str | None) -> inference_pb2.Chat:
    """Returns the chat of an input.

    Args:
        items: The items, in order.
        instructions: The system's message before them; it is joined with one that opens the input,
            because one is all that some models take.
    """
    turns: list[inference_pb2.ChatMessage] = []
    if instructions:
        turns.append(inference_pb2.ChatMessage(role="system", content=instructions))
    for item in items:
        match item:
            case InputMessage():
                role = "system" if item.role == "developer" else item.role
                if role == "system" and len(turns) == 1 and instructions:
                    turns[0].content = f"{instructions}\n\n{item.content}"
                    instructions = None
                    continue
                turns.append(inference_pb2.ChatMessage(role=role, content=item.content))
            case FunctionCall():
                # Calls stand behind the text of their answer, and behind one another.
                if not (turns and turns[-1].role == "assistant"):
                    turns.append(inference_pb2.ChatMessage(role="assistant"))
                turns[-1].tool_calls.add(id=item.call_id, name=item.name, arguments=item.arguments)
            case FunctionCallOutput():
                turns.append(
                    inference_pb2.ChatMessage(
                        role="tool", content=item.output, tool_call_id=item.call_id
                    )
                )
    return inference_pb2.Chat(messages=turns)
