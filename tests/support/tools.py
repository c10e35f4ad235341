"""Functions that tests let models call, and chats that have called them."""

import json
from collections.abc import Sequence

from mixtral_jax.tokenization.messages import Message, Tool, ToolCall
from mixtral_jax.tokenization.tokenizer import Tokenizer


def parameters(**properties: str) -> str:
    """The schema of an object whose properties are all required, by name and type."""
    schema = {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }
    return json.dumps(schema)


WEATHER = Tool("get_weather", "Tells the weather", parameters(city="string", days="integer"))
ADD = Tool("add", "", parameters(a="number", b="number"))
TOOLS = (WEATHER, ADD)

ROME: ToolCall = {
    "id": "abcDEF123",
    "name": "get_weather",
    "arguments": '{"city": "Rome", "days": 3}',
}
SUM: ToolCall = {"id": "123456789", "name": "add", "arguments": '{"a": 1.5, "b": -2}'}


def asked(*calls: ToolCall, text: str = "") -> list[Message]:
    """A user's message and an assistant's that calls."""
    answer: Message = {"role": "assistant", "content": text, "tool_calls": list(calls)}
    return [{"role": "user", "content": "Please"}, answer]


def result(call_id: str, content: str) -> Message:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def answered(calls: Sequence[ToolCall], *contents: str) -> list[Message]:
    """The calls with their results."""
    results = [result(call["id"], text) for call, text in zip(calls, contents, strict=True)]
    return [*asked(*calls), *results]


def called_ids(tokenizer: Tokenizer, *calls: str) -> list[int]:
    """The ids of a whole answer that calls: what stands between the question and the results."""
    chosen = [{"Rome": ROME, "sum": SUM}[call] for call in calls]
    chat = asked(*chosen)
    results: list[Message] = [
        {"role": "tool", "content": "1", "tool_call_id": call["id"]} for call in chosen
    ]
    before = tokenizer.chat(chat[:1], tools=TOOLS)
    ids = tokenizer.chat([*chat, *results], tools=TOOLS)
    assert ids[: len(before)] == before
    (eos,) = tokenizer.eos_ids
    return ids[len(before) : ids.index(eos, len(before))]
