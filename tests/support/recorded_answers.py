"""Answers of the recorder: fixed ones, in the forms of OpenAI's routes and Anthropic's messages."""

import json
from typing import Any

PERSON = {
    "name": "Ada",
    "town": "Paris",
    "age": 36,
    "likes": ["chess", "tea"],
    "is_member": True,
    "note": None,
}
_MEMBER = json.dumps({"town": "Paris", "drink": None, "is_member": True})
_ARGUMENTS = {"get_weather": {"town": "Paris", "unit": "c"}, "add": {"a": 1, "b": 2}}
# Longer than nine characters and with signs: what OpenAI's own ids look like, and worse.
CALL_ID = "call_Zk3-q_90"
_USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


def _called(body: dict[str, Any]) -> str | None:
    """The function that the request forces, if it does."""
    choice = body.get("tool_choice")
    tools = [tool.get("function", tool) for tool in body.get("tools", [])]
    if isinstance(choice, dict):
        if choice["type"] == "allowed_tools":
            choice = choice["allowed_tools"]["tools"][0]
        name: str = choice.get("function", choice)["name"]
        return name
    if choice in ("required", "any"):
        first: str = tools[0]["name"]
        return first
    return None


def _arguments(name: str) -> str:
    return json.dumps(_ARGUMENTS.get(name, PERSON))


def _text(body: dict[str, Any]) -> str:
    shape = body.get("response_format") or body.get("text", {}).get("format") or {}
    outputs = body.get("structured_outputs", {})
    if choices := outputs.get("choice") or body.get("guided_choice"):
        first: str = choices[0]
        return first
    if "regex" in outputs or "guided_regex" in body:
        return "ab-12"
    if "grammar" in outputs or "guided_grammar" in body or "grammar" in body:
        return "yes"
    extras = ("structured_outputs", "guided_json", "json_schema")
    if shape.get("type") in ("json_object", "json_schema") or any(x in body for x in extras):
        return json.dumps(PERSON)
    if "```json" in json.dumps(body):
        return f"```json\n{json.dumps(PERSON)}\n```"
    return "It rains."


def _is_cut(body: dict[str, Any]) -> bool:
    return (body.get("max_tokens") or 100) < 8


def chat_answer(body: dict[str, Any]) -> dict[str, Any]:
    """A whole chat completion."""
    message: dict[str, Any] = {"role": "assistant", "content": _text(body)}
    reason = "length" if _is_cut(body) else "stop"
    if name := _called(body):
        function = {"name": name, "arguments": _arguments(name)}
        call = {"id": CALL_ID, "index": 0, "type": "function", "function": function}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        reason = "tool_calls"
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": _USAGE,
    }


def chat_chunks(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The same as chunks: role, content or call, finish."""
    whole = chat_answer(body)
    choice = whole["choices"][0]
    message = choice["message"]
    rest = {name: message[name] for name in ("content", "tool_calls") if message.get(name)}
    deltas: list[tuple[dict[str, Any], str | None]] = [
        ({"role": "assistant", "content": ""}, None),
        (rest, None),
        ({"content": ""}, choice["finish_reason"]),
    ]
    head = {name: whole[name] for name in ("id", "created", "model")}
    return [
        {
            **head,
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
            # Mistral's client for Node fails on a usage of null.
            **({"usage": whole["usage"]} if reason else {}),
        }
        for delta, reason in deltas
    ]


def text_answer(body: dict[str, Any]) -> dict[str, Any]:
    """A whole completion of a prompt."""
    choice = {"index": 0, "text": _text(body), "finish_reason": "stop", "logprobs": None}
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": _USAGE,
    }


def _item(body: dict[str, Any]) -> dict[str, Any]:
    if name := _called(body):
        return {
            "type": "function_call",
            "id": "fc_1",
            "call_id": CALL_ID,
            "name": name,
            "arguments": _arguments(name),
            "status": "completed",
        }
    return {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": _text(body), "annotations": []}],
    }


def response_answer(body: dict[str, Any], output: bool = True) -> dict[str, Any]:
    """A whole response, or with `output` false one that has begun."""
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "status": "completed" if output else "in_progress",
        "model": "m",
        "output": [_item(body)] if output else [],
        "parallel_tool_calls": True,
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": body.get("tools", []),
        "usage": {
            "input_tokens": 5,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 7,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 12,
        },
    }


def response_events(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The same as events in OpenAI's order."""
    item = _item(body)
    where = {"item_id": item["id"], "output_index": 0}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": response_answer(body, output=False)},
        {"type": "response.in_progress", "response": response_answer(body, output=False)},
    ]
    if item["type"] == "function_call":
        begun = {**item, "arguments": "", "status": "in_progress"}
        events += [
            {"type": "response.output_item.added", "output_index": 0, "item": begun},
            {
                "type": "response.function_call_arguments.delta",
                **where,
                "delta": item["arguments"],
            },
            {
                "type": "response.function_call_arguments.done",
                **where,
                "name": item["name"],
                "arguments": item["arguments"],
            },
        ]
    else:
        (part,) = item["content"]
        where = {**where, "content_index": 0}
        empty = {**part, "text": ""}
        begun = {**item, "content": [], "status": "in_progress"}
        text = {"logprobs": []}
        events += [
            {"type": "response.output_item.added", "output_index": 0, "item": begun},
            {"type": "response.content_part.added", **where, "part": empty},
            {"type": "response.output_text.delta", **where, **text, "delta": part["text"]},
            {"type": "response.output_text.done", **where, **text, "text": part["text"]},
            {"type": "response.content_part.done", **where, "part": part},
        ]
    events += [
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": response_answer(body)},
    ]
    return [{**event, "sequence_number": i} for i, event in enumerate(events)]


def message_answer(body: dict[str, Any]) -> dict[str, Any]:
    """A whole message of Anthropic's API."""
    choice = body.get("tool_choice", {"type": "auto"})
    form = body.get("output_config", {}).get("format")
    block: dict[str, Any] = {"type": "text", "text": _MEMBER if form else "It rains."}
    if choice["type"] in ("any", "tool"):
        name = choice.get("name") or body["tools"][0]["name"]
        arguments = _ARGUMENTS.get(name, {"town": "Paris"})
        block = {"type": "tool_use", "id": CALL_ID, "name": name, "input": arguments}
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [block],
        "stop_reason": "tool_use" if block["type"] == "tool_use" else "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 5, "output_tokens": 7},
    }


def message_events(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The same as events in Anthropic's order."""
    whole = message_answer(body)
    (block,) = whole["content"]
    empty = block | ({"text": ""} if block["type"] == "text" else {"input": {}})
    delta = {"type": "text_delta", "text": block.get("text")}
    if block["type"] == "tool_use":
        delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
    ended = {name: whole[name] for name in ("stop_reason", "stop_sequence")}
    return [
        {
            "type": "message_start",
            "message": whole | {"content": [], "stop_reason": None},
        },
        {"type": "content_block_start", "index": 0, "content_block": empty},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": ended, "usage": whole["usage"]},
        {"type": "message_stop"},
    ]
