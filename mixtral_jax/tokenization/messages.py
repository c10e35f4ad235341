"""Messages of a chat: their roles, and the checks that every chat passes first.

`checked` is the gate: the messages that it returns have known roles and valid text, so that the
code that formats them afterwards need not check.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from mixtral_jax.errors import ChatError

ROLES = ("system", "user", "assistant")


class ToolCall(TypedDict):
    """A call of a tool that an assistant's message holds."""

    id: str  # in answers nine letters and digits; in a history whatever it was given
    name: str
    arguments: str  # JSON; in a history perhaps not


class Message(TypedDict):
    """One turn of a chat."""

    role: str  # one of ROLES
    content: str
    tool_calls: NotRequired[list[ToolCall]]  # of an assistant's message
    tool_call_id: NotRequired[str]  # of a tool's message: the id of the call that it answers


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: str = ""  # JSON Schema of the arguments, as JSON; empty for none
    strict: bool = False  # refuses parameters of which a part cannot be enforced


def check_text(text: str, name: str) -> None:
    """Raise ChatError, naming the text by `name`, for text that UTF-8 cannot carry."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ChatError(
            f"{name} has half of a surrogate pair at character {error.start}: "
            "send the whole character, or U+FFFD in its place"
        ) from None


def checked(messages: Sequence[Message], *, continue_last: bool = False) -> list[Message]:
    """Return the messages with role and content only.

    With `continue_last` the last message must be an assistant's, with some text. Raises ChatError
    that names the first message that is wrong.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise ChatError(
            f"the chat is a {type(messages).__name__}: send a list of messages, such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    if not messages:
        raise ChatError("the chat is empty: send at least one user message")
    chat: list[Message] = []
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatError(
                f"messages[{place}] is a {type(message).__name__}: send role and content, such as "
                '{"role": "user", "content": "Hello"}'
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ChatError(f"messages[{place}] has role {role!r}: use one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ChatError(f"messages[{place}] has no text: its content must be a string")
        check_text(content, f"messages[{place}]")
        chat.append({"role": role, "content": content})
    if continue_last and not (chat[-1]["role"] == "assistant" and chat[-1]["content"].strip()):
        raise ChatError(
            "the last message cannot be continued: it must be an assistant's, with some text"
        )
    return chat
