"""Rows of chats drawn from a seed, as users write them for fine-tuning: JSON in OpenAI's form."""

import json
import random
from typing import Any

from tests.support.tokenizers import ATTACKS, TEXTS
from tests.support.tools import TOOLS

_WORDS = (
    "rain",
    "Rome",
    "the",
    "tells",
    "seven",
    "Grüße",
    "x=1",
    "你好",
    "🙂",
    "and",
    "I",
    "don't",
)
# A template may take outer white space off, and U+10FFFF becomes U+FFFD in some tokenizers: such
# answers cannot be learnt as they stand, and are refused.
_TEXTS = [
    text for text in [*TEXTS, *ATTACKS] if text.strip() == text != "" and "\U0010ffff" not in text
]


def _text(draw: random.Random) -> str:
    if draw.random() < 0.2:
        return draw.choice(_TEXTS)
    return " ".join(draw.choices(_WORDS, k=draw.randint(1, 12)))


def _call(draw: random.Random, number: int) -> dict[str, Any]:
    name = draw.choice([tool.name for tool in TOOLS])
    arguments: dict[str, Any] = {"city": _text(draw), "days": draw.randint(0, 9)}
    is_text = draw.random() < 0.8
    return {
        "id": draw.choice([f"call_{number}", f"abcDEF{number:03}", f"toolu_{number}"]),
        "type": "function",
        "function": {
            "name": name,
            "arguments": json.dumps(arguments, ensure_ascii=False) if is_text else arguments,
        },
    }


def random_row(draw: random.Random) -> dict[str, Any]:
    """A chat with or without a system message, tools, calls with their results, and weights."""
    messages: list[dict[str, Any]] = []
    has_tools = draw.random() < 0.5
    if draw.random() < 0.5:
        messages.append({"role": draw.choice(["system", "developer"]), "content": _text(draw)})
    number = 0
    for _ in range(draw.randint(1, 4)):
        content: Any = _text(draw)
        if draw.random() < 0.1:
            content = [{"type": "text", "text": content}, {"type": "text", "text": _text(draw)}]
        messages.append({"role": "user", "content": content})
        while has_tools and draw.random() < 0.4:
            calls = [_call(draw, number + n) for n in range(draw.randint(1, 2))]
            number += len(calls)
            messages.append({"role": "assistant", "content": None, "tool_calls": calls})
            for call in calls:
                content = draw.choice([_text(draw), '{"degrees": 21.5}', "[1, 2]"])
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
        messages.append({"role": "assistant", "content": _text(draw)})
    for message in messages:
        if message["role"] == "assistant" and draw.random() < 0.4:
            message["weight"] = draw.choice([0, 1])
    messages[-1]["weight"] = 1
    row: dict[str, Any] = {"messages": messages}
    if has_tools:
        row["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": json.loads(tool.parameters),
                },
            }
            for tool in TOOLS
        ]
    return row
