"""Rows of a data set: the lines of a JSONL file, read and checked.

A line is a JSON object in one of these forms:

    {"messages": [...], "tools": [...]}           a chat, as OpenAI's fine-tuning has it
    {"prompt": "...", "completion": "..."}        text that is read, then text that is written
    {"prompt": [...], "completion": [...]}        the same as messages (TRL's conversational form)
    {"text": "..."}                               text, all of which is written

An assistant's message may have a `weight`: 0 is only read, 1 is learnt, as all are that have none.
https://platform.openai.com/docs/guides/fine-tuning, https://huggingface.co/docs/trl/dataset_formats
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from mixtral_jax.errors import UserError
from mixtral_jax.tokenization.messages import ROLES, Message, Tool, ToolCall

MESSAGES, TOOLS, PROMPT, COMPLETION, TEXT = "messages", "tools", "prompt", "completion", "text"
_FORMS = 'give "messages", "prompt" and "completion", or "text"'
# A choice between one call and several changes nothing of the ids that a model reads.
UNREAD = ("parallel_tool_calls",)
_MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "weight")


class DataError(UserError):
    """A data set with rows that cannot be trained on; the message names them by file and line."""


@dataclass(frozen=True)
class Chat:
    """A chat of which some answers are learnt."""

    messages: Sequence[Message]
    is_learnt: Sequence[bool]  # of each message; true for assistants' messages only
    tools: Sequence[Tool] = ()


@dataclass(frozen=True)
class Completion:
    """Plain text of which the end is learnt; an empty prompt stands for none."""

    prompt: str
    completion: str


C = TypeVar("C")


class Row(NamedTuple, Generic[C]):
    """A line of a file, by its name and number."""

    place: str  # FILE:LINE
    content: C


class Refused(NamedTuple):
    """A line that cannot be trained on, and the reason."""

    place: str  # FILE:LINE
    reason: str


def rows_of(
    path: Path,
    read: Callable[[Mapping[str, object], Collection[str]], C],
    ignored_keys: Collection[str] = (),
) -> Iterator[Row[C] | Refused]:
    """Yields the rows of a JSONL file in their order; lines without anything are no rows.

    Args:
        path: The file, in UTF-8.
        read: Makes the content of a line's object and of `ignored_keys`, or raises DataError.
        ignored_keys: Keys of rows that may be there and mean nothing. Any other key that is not of
            a form is refused.

    Raises DataError if there is no such file.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    yield Row(place, read(_parsed(line), ignored_keys))
                except DataError as error:
                    yield Refused(place, str(error))
    except OSError as error:
        raise DataError(f"cannot read the data set {path}: {error.strerror}") from None


def _parsed(line: bytes) -> Mapping[str, object]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError("is UTF-16: save the file as UTF-8") from None
        raise DataError(f"is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        if line.strip() in (b"{", b"["):
            raise DataError("is no JSON by itself: a row is one line (JSON Lines)") from None
        raise DataError(f"is no JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON that can be read: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise DataError(f"is a JSON {kind_of(value)}, not an object: a row is one object")
    return value


def read_content(row: Mapping[str, object], ignored_keys: Collection[str]) -> Chat | Completion:
    """Returns the chat or the text of a line's object. Raises DataError."""
    keys = {key for key, value in row.items() if value is not None} - set(ignored_keys)
    forms = {
        frozenset({MESSAGES}): {TOOLS, *UNREAD},
        frozenset({PROMPT, COMPLETION}): {TOOLS, *UNREAD},
        frozenset({TEXT}): set(),
    }
    fitting = [form for form in forms if form <= keys]
    if not fitting:
        hint = "; pairs are for --set objective=preference" if "chosen" in keys else ""
        raise DataError(f"has the keys {listed(keys)}: {_FORMS}{hint}")
    if len(fitting) > 1:
        raise DataError(f"has the keys {listed(keys)}, which are several forms: {_FORMS}")
    if unknown := keys - fitting[0] - forms[fitting[0]]:
        raise DataError(
            f"has the unknown key {listed(unknown)}: take it out, or name it in ignored_keys"
        )
    if TEXT in keys:
        return Completion("", read_text(row[TEXT], TEXT))
    if MESSAGES in keys:
        messages, is_learnt = read_messages(row[MESSAGES], MESSAGES, is_prompt=False)
        return read_chat(messages, is_learnt, row)
    prompt, completion = row[PROMPT], row[COMPLETION]
    if isinstance(prompt, str) and isinstance(completion, str):
        if row.get(TOOLS):
            raise DataError("has tools beside text: give prompt and completion as messages")
        return Completion(prompt, read_text(completion, COMPLETION))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise DataError("has a prompt and a completion of which only one is text")
    before, _ = read_messages(prompt, PROMPT, is_prompt=True)
    after, is_learnt = read_messages(completion, COMPLETION, is_prompt=False)
    return read_chat([*before, *after], [*[False] * len(before), *is_learnt], row)


def read_chat(messages: list[Message], is_learnt: list[bool], row: Mapping[str, object]) -> Chat:
    """Returns a chat with the tools of a row. Raises DataError where no message is learnt."""
    if not any(is_learnt):
        raise DataError("has nothing to learn: no message of the role assistant with a weight of 1")
    return Chat(messages, is_learnt, _tools(row.get(TOOLS) or []))


def read_text(value: object, name: str) -> str:
    """Returns a text that is not empty. Raises DataError, naming its key."""
    if not isinstance(value, str) or not value:
        raise DataError(f"has a {name} that is {kind_of(value)}: give text")
    return value


def read_messages(value: object, key: str, *, is_prompt: bool) -> tuple[list[Message], list[bool]]:
    """Returns the messages of a list, and which of them are learnt: none of a prompt."""
    if not isinstance(value, list) or not value:
        raise DataError(f"has {key} that are {kind_of(value)}: give a list of messages")
    messages, is_learnt = [], []
    for place, item in enumerate(value):
        name = f"{key}[{place}]"
        if not isinstance(item, dict):
            raise DataError(f"has {name} that is {kind_of(item)}: give role and content")
        given = {name: field for name, field in item.items() if field is not None}
        if unknown := given.keys() - set(_MESSAGE_KEYS):
            raise DataError(f"has the unknown key {listed(unknown)} in {name}")
        message = _message(given, name)
        weight = given.get("weight", 1)
        if "weight" in given and message["role"] != "assistant":
            raise DataError(f"has a weight in {name}: only messages of an assistant have one")
        if isinstance(weight, bool) or weight not in (0, 1):
            raise DataError(f"has the weight {str(weight)[:40]} in {name}: give 0 or 1")
        if "weight" in given and is_prompt and weight:
            raise DataError(f"has the weight 1 in {name}: a prompt is only read")
        messages.append(message)
        is_learnt.append(message["role"] == "assistant" and bool(weight) and not is_prompt)
        if is_learnt[-1]:
            _check_arguments(message, name)
    return messages, is_learnt


def _message(given: Mapping[str, object], name: str) -> Message:
    role = given.get("role")
    if role == "developer":  # OpenAI's newer name
        role = "system"
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"has the role {str(role)[:40]!r} in {name}: use one of developer, {', '.join(ROLES)}"
        )
    calls = given.get("tool_calls") or []
    content = given.get("content")
    if isinstance(content, list):
        content = "\n".join(_text_of(item, name) for item in content)
    if content is None and role == "assistant" and calls:
        content = ""
    if not isinstance(content, str):
        raise DataError(f"has a content in {name} that is {kind_of(content)}: give text")
    message: Message = {"role": role, "content": content}
    if calls:
        if role != "assistant":
            raise DataError(f"has tool_calls in {name}: only an assistant calls tools")
        if not isinstance(calls, list):
            raise DataError(f"has tool_calls in {name} that are {kind_of(calls)}: give a list")
        message["tool_calls"] = [_call(call, name) for call in calls]
    call_id = given.get("tool_call_id", "")
    if not isinstance(call_id, str):
        raise DataError(f"has a tool_call_id in {name} that is {kind_of(call_id)}: give text")
    if call_id and role != "tool":
        raise DataError(f"has a tool_call_id in {name}: only results of tools have one")
    if call_id:
        message["tool_call_id"] = call_id
    if role == "assistant" and not content and not calls:
        raise DataError(f"has neither text nor calls in {name}, an assistant's message")
    if "name" in given and role != "tool":
        raise DataError(f"has a name in {name}, which the model never reads: take it out")
    return message


def _text_of(item: object, name: str) -> str:
    """Returns the text of a part of a content; the server joins them with line breaks."""
    if isinstance(item, dict) and item.get("type") == "text" and isinstance(item.get("text"), str):
        return str(item["text"])
    raise DataError(f"has a part of the content of {name} that is not of type text")


def _call(call: object, name: str) -> ToolCall:
    if not isinstance(call, dict) or call.get("type", "function") != "function":
        raise DataError(f"has a call in {name} that is not of type function")
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"has a call in {name} without a function and its name")
    arguments = function.get("arguments") or ""
    if isinstance(arguments, dict):  # as clients of Mistral's write them
        arguments = json.dumps(arguments, ensure_ascii=False)
    call_id = call.get("id") or ""
    if not isinstance(arguments, str) or not isinstance(call_id, str):
        raise DataError(f"has a call in {name} whose id or arguments are no text")
    return {"id": call_id, "name": function["name"], "arguments": arguments}


def _check_arguments(message: Message, name: str) -> None:
    """Raises DataError for calls that a model must not learn: no server could read them."""
    for place, call in enumerate(message.get("tool_calls", [])):
        try:
            value = json.loads(call["arguments"], parse_constant=_no_number)
        except (ValueError, RecursionError):
            kind = "no JSON" if call["arguments"] else "empty"
        else:
            if isinstance(value, dict):
                continue
            kind = f"a JSON {kind_of(value)}"
        raise DataError(
            f"has arguments in {name}, tool_calls[{place}], that are {kind}, and a call is learnt "
            'as it stands: give a JSON object, such as {}, or give the message "weight": 0'
        )


def _no_number(word: str) -> object:
    raise ValueError(f"{word} is no number of JSON")


def _tools(value: object) -> tuple[Tool, ...]:
    if not isinstance(value, list):
        raise DataError(f"has tools that are {kind_of(value)}: give a list")
    tools = []
    for place, item in enumerate(value):
        function = item.get("function") if isinstance(item, dict) else None
        if not isinstance(function, dict) or item.get("type", "function") != "function":
            raise DataError(f"has tools[{place}] that is no function")
        name, description = function.get("name"), function.get("description") or ""
        parameters = function.get("parameters") or {}
        if not isinstance(name, str) or not isinstance(description, str):
            raise DataError(f"has tools[{place}] whose name or description is no text")
        if not isinstance(parameters, dict):
            raise DataError(f"has tools[{place}] whose parameters are {kind_of(parameters)}")
        written = json.dumps(parameters, ensure_ascii=False) if parameters else ""
        tools.append(Tool(name, description, written, bool(function.get("strict"))))
    return tuple(tools)


def kind_of(value: object) -> str:
    """Returns the name that JSON has for the kind of a value."""
    names = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return "an empty text" if value == "" else names.get(type(value), "number")


def listed(keys: Collection[str]) -> str:
    """Returns keys in quotes, for an error."""
    return ", ".join(sorted(repr(key[:40]) for key in keys)) or "none"
