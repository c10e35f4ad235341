"""A form of calls for models that have none: tools, calls and results as ordinary text.

Models whose format or chat template knows no tools (Mistral's v1, SmolLM2, the toy of bytes) read
this in the system message:

    You can call functions. Each line is a function, with a JSON Schema of its arguments:
    {"name": "add", "description": "...", "parameters": {...}}
    To call functions, write only this: <tool_call>[{"name": "...", "arguments": {...}}]</tool_call>
    You then get their results. If no function helps, answer in plain text.

They call in that form, which is the one of SmolLM2-1.7B and like that of other families, and which
no JSON begins with. They get results as a user's message that begins with "Results of the
functions:", a line each: {"name": "add", "content": ...}.
"""

import json
from collections.abc import Sequence

from mixtral_jax.tokenization.messages import Message, Tool, ToolCall, checked_tools, parsed_json
from mixtral_jax.tokenization.tool_form import Slot, ToolForm

PROMPT_FORM = ToolForm(
    begin=("<tool_call>[",),
    call=('{"name": "', Slot.NAME, '", "arguments": ', Slot.ARGUMENTS, "}"),
    separator=(", ",),
    end=("]</tool_call>",),
    is_compact=False,
    one_unless_asked=True,
)
_HEAD = "You can call functions. Each line is a function, with a JSON Schema of its arguments:"
_TAIL = (
    "To call functions, write only this: "
    '<tool_call>[{"name": "...", "arguments": {...}}]</tool_call>\n'
    "You then get their results. If no function helps, answer in plain text."
)
_RESULTS = "Results of the functions:"


def prompted(
    messages: Sequence[Message], tools: Sequence[Tool], *, in_user: bool = False
) -> list[Message]:
    """Return a chat without tools that says the same: system, user and assistant messages only.

    Results of neighbouring messages, and the user's message behind them, are one user's message,
    because many templates want turns to alternate. A message with text and calls keeps its calls
    alone, as the form demands. Empty assistant messages are left out, except from a chat that has
    neither tools nor calls, which stays as it is.

    Args:
        messages: what `checked` has returned.
        tools: those that may be called.
        in_user: tells of the tools in the first user's message, for templates that refuse system
            messages.

    Raises ChatError for tools that are wrong.
    """
    if not tools and not any("tool_calls" in message for message in messages):
        return list(messages)
    made: list[Message] = []
    after_result = False
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            line = _line({"name": message["name"], "content": parsed_json(content)})
            if after_result:
                made[-1]["content"] += f"\n{line}"
            else:
                made.append({"role": "user", "content": f"{_RESULTS}\n{line}"})
        elif role == "user" and after_result:
            made[-1]["content"] += f"\n\n{content}"
        elif calls := message.get("tool_calls"):
            made.append({"role": "assistant", "content": _calls_text(calls)})
        elif content or role != "assistant":
            made.append({"role": role, "content": content})
        after_result = role == "tool"
    if tools:
        text = "\n".join([_HEAD, *map(_line, checked_tools(tools)), _TAIL])
        user = next((m for m in made if m["role"] == "user"), None) if in_user else None
        if user is not None:
            user["content"] = f"{text}\n\n{user['content']}"
        else:
            system = made.pop(0)["content"] if made and made[0]["role"] == "system" else ""
            text = f"{system}\n\n{text}" if system else text
            made.insert(0, {"role": "system", "content": text})
    return made


def _calls_text(calls: Sequence[ToolCall]) -> str:
    """Return the calls as a model writes them, arguments as they came if they are JSON."""
    return f"<tool_call>[{', '.join(map(_call_text, calls))}]</tool_call>"


def _call_text(call: ToolCall) -> str:
    arguments = call["arguments"] or "{}"
    if parsed_json(arguments) is arguments:  # no JSON
        arguments = json.dumps(arguments, ensure_ascii=False)
    return f'{{"name": {_line(call["name"])}, "arguments": {arguments}}}'


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
