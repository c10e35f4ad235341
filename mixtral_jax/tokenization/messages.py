"""Messages of a chat: their roles, and the checks that every chat passes first.

`checked` is the gate: the messages that it returns have known roles and valid text, so that the
code that formats them afterwards need not check.
"""

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from mixtral_jax.errors import ChatError
from mixtral_jax.tokenization.call_ids import CallIds

ROLES = ("system", "user", "assistant", "tool")
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


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
    name: NotRequired[str]  # of a tool's message: the name of that tool, which `checked` fills in


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


def checked(
    messages: Sequence[Message], *, continue_last: bool = False, closes_last: bool = False
) -> list[Message]:
    """Return the messages with the known keys only, calls and results paired by ids.

    Each id of a call becomes one of nine letters and digits, the same for call and result (see
    `CallIds`); a result without an id answers the first call that has no result yet. A call without
    a result stays. With `continue_last` the last message must be an assistant's, with some text and
    no calls; with `closes_last` an assistant's, with text or calls. Raises ChatError that names the
    first message that is wrong.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise ChatError(
            f"the chat is a {type(messages).__name__}: send a list of messages, such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    if not messages:
        raise ChatError("the chat is empty: send at least one user message")
    chat: list[Message] = []
    pairs = _Pairs()
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatError(
                f"messages[{place}] is a {type(message).__name__}: send role and content, such as "
                '{"role": "user", "content": "Hello"}'
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ChatError(f"messages[{place}] has role {role!r}: use one of {', '.join(ROLES)}")
        calls = message.get("tool_calls") or []
        if content is None and role == "assistant" and calls:
            content = ""  # as OpenAI writes a message that only calls
        if not isinstance(content, str):
            raise ChatError(f"messages[{place}] has no text: its content must be a string")
        check_text(content, f"messages[{place}]")
        kept: Message = {"role": role, "content": content}
        if calls:
            kept["tool_calls"] = pairs.calls(calls, role, f"messages[{place}]")
        if role == "tool":
            call = pairs.answered(message.get("tool_call_id") or "", place)
            kept["tool_call_id"], kept["name"] = call["id"], call["name"]
        chat.append(kept)
    last = chat[-1]
    if continue_last and (
        last["role"] != "assistant" or not last["content"].strip() or "tool_calls" in last
    ):
        raise ChatError(
            "the last message cannot be continued: it must be an assistant's, with some text and "
            "without calls of tools"
        )
    if closes_last and (
        last["role"] != "assistant" or not (last["content"] or last.get("tool_calls"))
    ):
        raise ChatError(
            "the last message is no answer: it must be an assistant's, with text or calls of tools"
        )
    return chat


class _Pairs:
    """Calls of the messages so far, and which of them have results."""

    def __init__(self) -> None:
        self._ids = CallIds()
        self._by_id: dict[str, list[ToolCall]] = {}  # of the last message that has the id
        self._in_order: deque[ToolCall] = deque()  # of the last message, without results

    def calls(self, calls: object, role: str, where: str) -> list[ToolCall]:
        """Takes in the calls of a message and returns them with mapped ids. Raises ChatError."""
        if role != "assistant":
            raise ChatError(f"{where} has tool_calls and role {role!r}: only an assistant calls")
        if isinstance(calls, str | bytes) or not isinstance(calls, Sequence):
            raise ChatError(f"tool_calls of {where} is a {type(calls).__name__}: send a list")
        taken: list[ToolCall] = []
        by_id: dict[str, list[ToolCall]] = {}
        for place, call in enumerate(calls):
            fields = _call_fields(call, f"{where}.tool_calls[{place}]")
            fields["id"] = self._ids.map(fields["id"] or f"{where}.tool_calls[{place}] has none")
            taken.append(fields)
            by_id.setdefault(fields["id"], []).insert(0, fields)
        self._by_id.update(by_id)
        self._in_order = deque(taken)
        return taken

    def answered(self, call_id: object, place: int) -> ToolCall:
        """Returns the call that message `place` answers. Raises ChatError if there is none."""
        where, path = f"messages[{place}]", ("messages", str(place), "tool_call_id")
        if not isinstance(call_id, str):
            raise ChatError(f"tool_call_id of {where} is a {type(call_id).__name__}: send text")
        check_text(call_id, f"tool_call_id of {where}")
        if not call_id and self._in_order:
            return self._in_order.popleft()
        calls = self._by_id.get(self._ids.map(call_id)) if call_id else None
        if not calls:
            raise ChatError(
                f"{where} is the result of the call {call_id[:100]!r}, which no message before it "
                "makes: send the assistant's message with that call too",
                path,
            )
        # Calls of one message may share an id. The last one takes any further results.
        return calls.pop() if len(calls) > 1 else calls[0]


def _call_fields(call: object, name: str) -> ToolCall:
    """Return the fields of a call; absent ones are empty. Raises ChatError for what is no text."""
    if not isinstance(call, Mapping):
        raise ChatError(f"{name} is a {type(call).__name__}: send id, name and arguments")
    fields = {key: call.get(key) or "" for key in ("id", "name", "arguments")}
    for key, text in fields.items():
        if not isinstance(text, str):
            raise ChatError(f"{key} of {name} is a {type(text).__name__}: send text")
        check_text(text, f"{key} of {name}")
    if not fields["name"]:
        raise ChatError(f"{name} has no name: send that of the function that was called")
    return {"id": fields["id"], "name": fields["name"], "arguments": fields["arguments"]}


def checked_tools(tools: Sequence[Tool]) -> list[dict[str, object]]:
    """Return the tools as templates and Mistral's formats have them, parameters as an object.

    Such as {"name": "add", "description": "", "parameters": {"type": "object", ...}}. Raises
    ChatError that names the first tool that is wrong.
    """
    functions: list[dict[str, object]] = []
    names: set[str] = set()
    for place, tool in enumerate(tools):
        if not isinstance(tool.name, str) or not _TOOL_NAME.fullmatch(tool.name):
            raise ChatError(
                f"tools[{place}] has the name {str(tool.name)[:100]!r}: use 1 to 64 letters, "
                "digits, _, - and ."
            )
        if tool.name in names:
            raise ChatError(f"tools[{place}] has the name {tool.name!r}, as a tool before it")
        names.add(tool.name)
        check_text(tool.description, f"description of tools[{place}]")
        functions.append(
            {
                "name": tool.name,
                "description": tool.description,
                "parameters": _parameters(tool, place),
            }
        )
    return functions


def _parameters(tool: Tool, place: int) -> dict[str, object]:
    parsed = parsed_json(tool.parameters) if tool.parameters else {}
    if not isinstance(parsed, dict):
        raise ChatError(
            f"parameters of tools[{place}] ({tool.name}) are no JSON object, or nested more than "
            f"{_DEEPEST} deep: send a JSON Schema, such as "
            '{"type": "object", "properties": {}}'
        )
    return parsed


_DEEPEST = 100  # levels of JSON; the json module fails at about a thousand


def parsed_json(text: str) -> object:
    """Return the value of a JSON text; the text itself if it is none that can be written again.

    That is text that is no JSON, is nested more than a hundred levels deep, has a number of more
    than 4,300 digits, or spells half of a surrogate pair.
    """
    if text.count("[") + text.count("{") > _DEEPEST and _depth(text) > _DEEPEST:
        return text
    try:
        value: object = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return text
    return value


_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)


def _depth(text: str) -> int:
    """Return how deep the brackets outside of strings are nested."""
    depth = deepest = 0
    for match in _BRACKETS.finditer(text):
        if match[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in "]}":
            depth -= 1
    return deepest
