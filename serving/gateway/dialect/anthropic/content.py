"""The messages of a request to Anthropic's API: turns of content blocks, and what they mean here.

    conversation   Turns -> the messages of a Chat (proto)

Results of tools stand in messages of the user; in the proto each is a message of its own. Turns of
one role that follow each other are one turn, as in Anthropic's API. Fields of blocks that we do not
know are ignored, as a client sends back whatever an answer held. What a model has thought means
nothing to another one, and is left out.

https://docs.claude.com/en/api/messages
"""

import json
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, ValidationInfo
from pydantic_core import PydanticCustomError

from serving.gateway.dialect.fields import (
    MAX_PARTS,
    NOT_SUPPORTED,
    Described,
    Harmless,
    Name,
    Text,
    join_texts,
)
from serving.proto import inference_pb2

MAX_TURNS = 4096
CALL_ID_PREFIX = "toolu_"
"""The beginning of the ids of calls in answers; what follows is the id of the model."""
# Such an id in a history is given to the model without its beginning, as the model has written it,
# so that the next request of a conversation finds its prefix in the cache.
_OWN_CALL_ID = re.compile(r"toolu_([a-zA-Z0-9]{9})")
_ERROR = "Error: "
# Claude Code begins its system message with a block that begins so and differs between
# conversations: no two of them would share a prefix.
_BILLING = "x-anthropic-billing-header:"

# Types of blocks that are read or left out; all others are refused by name.
_TEXT, _CALL, _RESULT, _THINKING, _REDACTED = (
    *("text", "tool_use", "tool_result", "thinking", "redacted_thinking"),
)
BLOCK_TYPES = (_TEXT, _CALL, _RESULT, _THINKING, _REDACTED)
_TEXTS = {_TEXT: "text"}
# Roles in whose messages alone blocks of a type stand.
_OWNERS = {_CALL: "assistant", _RESULT: "user"}


class TextBlock(Described):
    """A block of text."""

    type: Literal["text"]
    """Always `text`."""
    text: Text
    """The text."""
    cache_control: Harmless = None
    """Means nothing here: computed prefixes are found by their content."""
    citations: Harmless = None
    """Means nothing here: an answer's sources are no part of its text."""


class ToolUseBlock(Described):
    """A call of a tool that an answer asked for."""

    type: Literal["tool_use"]
    """Always `tool_use`."""
    id: Name
    """The id that its result names."""
    name: Name
    """The name of the tool."""
    input: Annotated[
        Text, BeforeValidator(lambda value: _written(value), json_schema_input_type=dict[str, Any])
    ]
    """Its arguments, an object."""


class ToolResultBlock(Described):
    """The result of a call, from the client."""

    type: Literal["tool_result"]
    """Always `tool_result`."""
    tool_use_id: Name
    """The id of the call."""
    content: Annotated[
        Text,
        BeforeValidator(
            lambda content: _join_texts(content),
            json_schema_input_type=str | list[TextBlock] | None,
        ),
    ] = ""
    """A string, or a list of blocks of text."""
    is_error: bool | None = None
    """Whether the tool has failed: the model reads `Error: ` before the content."""


class ThinkingBlock(Described):
    """The thinking of a model that thinks; it is left out."""

    type: Literal["thinking", "redacted_thinking"]
    """One of the two."""


def _written(value: object) -> object:
    """Returns the input of a call as JSON."""
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "Input should be an object")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise PydanticCustomError("number", "a number of the input is out of range") from None


def _join_texts(content: object) -> object:
    return "" if content is None else join_texts(content, _TEXTS)


def _type_of(block: Any) -> object:
    return block.get("type") if isinstance(block, dict) else getattr(block, "type", None)


def _check_type(block: object) -> object:
    if not isinstance(block, dict):
        if isinstance(block, Described):
            return block
        raise PydanticCustomError("dict_type", "a block is an object with a type, such as text")
    kind = block.get("type")
    if kind is None:
        raise PydanticCustomError("missing", "the block has no type; give one, such as text")
    if kind not in BLOCK_TYPES:
        raise PydanticCustomError(
            NOT_SUPPORTED,
            "blocks of type '{kind}' are not supported: this model reads text only",
            {"kind": kind[:40] if isinstance(kind, str) else type(kind).__name__},
        )
    return block


Block = Annotated[
    Annotated[TextBlock, Tag(_TEXT)]
    | Annotated[ToolUseBlock, Tag(_CALL)]
    | Annotated[ToolResultBlock, Tag(_RESULT)]
    | Annotated[ThinkingBlock, Tag(_THINKING)]
    | Annotated[ThinkingBlock, Tag(_REDACTED)],
    Discriminator(_type_of),
    BeforeValidator(_check_type),
]


def _as_blocks(value: object) -> object:
    """Returns a text as a block."""
    return [{"type": _TEXT, "text": value}] if isinstance(value, str) else value


def _of_role(blocks: list[Any], info: ValidationInfo) -> list[Any]:
    """Refuses calls and results in messages of another role than theirs."""
    role = info.data.get("role")
    for block in blocks:
        owner = _OWNERS.get(block.type)
        if role is not None and owner not in (None, role):
            raise PydanticCustomError(
                "block_role",
                "blocks of type '{kind}' stand in messages of the role '{owner}'",
                {"kind": block.type, "owner": owner},
            )
    return blocks


class Turn(Described):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    """Who says it; the last one of the assistant is the beginning of the answer."""
    content: Annotated[
        list[Block],
        Field(max_length=MAX_PARTS, fail_fast=True),
        BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block]),
        AfterValidator(_of_role),
    ]
    """A string, or a list of blocks."""


Turns = Annotated[list[Turn], Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)]


def _join_system(content: object) -> object:
    """Joins the blocks of a system's message without a note on billing."""
    if isinstance(content, list) and len(content) <= MAX_PARTS:
        content = [block for block in content if not _is_billing(block)]
    return _join_texts(content)


def _is_billing(block: object) -> bool:
    text = block.get("text") if isinstance(block, dict) else None
    return isinstance(text, str) and text.startswith(_BILLING)


System = Annotated[
    Text, BeforeValidator(_join_system, json_schema_input_type=str | list[TextBlock])
]


def conversation(turns: Sequence[Turn], system: str | None) -> inference_pb2.Chat:
    """Returns the chat of a conversation.

    A system's message within it becomes text of the user's, in `<system>`, because the chat formats
    of most models have one at the beginning alone.

    Args:
        turns: The messages, in order.
        system: The system's message before them, which is joined with those that open them.
    """
    messages = [_Message("system", [system])] if system else []
    for turn in turns:
        for block in turn.content:
            match block:
                case TextBlock():
                    role, text = turn.role, block.text
                    if role == "system" and messages and messages[-1].role != "system":
                        role, text = "user", f"<system>\n{text}\n</system>"
                    _of(messages, role).texts.append(text)
                case ToolUseBlock():
                    _of(messages, turn.role).calls.append(block)
                case ToolResultBlock():
                    content = f"{_ERROR}{block.content}" if block.is_error else block.content
                    messages.append(
                        _Message("tool", [content], call_id=_call_id(block.tool_use_id))
                    )
    is_begun = bool(messages) and turns[-1].role == messages[-1].role == "assistant"
    return inference_pb2.Chat(
        messages=[message.proto() for message in messages], continue_last=is_begun
    )


@dataclass
class _Message:
    """A message that is gathered: a proto would hold every text that it ever had."""

    role: str
    texts: list[str] = field(default_factory=list)
    calls: list[ToolUseBlock] = field(default_factory=list)
    call_id: str = ""  # of a result

    def proto(self) -> inference_pb2.ChatMessage:
        """Returns the message for the service; each text but an empty first one begins a line."""
        return inference_pb2.ChatMessage(
            role=self.role,
            content="\n".join(dropwhile(operator.not_, self.texts)),
            tool_call_id=self.call_id,
            tool_calls=[
                inference_pb2.ToolCall(id=_call_id(call.id), name=call.name, arguments=call.input)
                for call in self.calls
            ],
        )


def _of(messages: list[_Message], role: str) -> _Message:
    """Returns the last message if it is of the role, or else a new one behind it."""
    if not (messages and messages[-1].role == role):
        messages.append(_Message(role))
    return messages[-1]


def _call_id(call_id: str) -> str:
    own = _OWN_CALL_ID.fullmatch(call_id)
    return own[1] if own else call_id
