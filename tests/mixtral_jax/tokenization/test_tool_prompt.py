"""Tools for models that have no form for them, read by eye."""

import json
from pathlib import Path
from typing import Any

from mixtral_jax.tokenization.messages import Message, Tool, checked
from mixtral_jax.tokenization.tokenizer import Tokenizer, load
from mixtral_jax.tokenization.tool_prompt import prompted
from tests.support.tokenizers import SPECS, say, turns, write
from tests.support.tools import ROME, SUM, answered, asked, result

SUB = Tool("sub", "Takes away", '{"type": "object"}')
LINES = (
    "You can call functions. Each line is a function, with a JSON Schema of its arguments:\n"
    '{"name": "sub", "description": "Takes away", "parameters": {"type": "object"}}\n'
    'To call functions, write only this: <tool_call>[{"name": "...", "arguments": {...}}]'
    "</tool_call>\n"
    "You then get their results. If no function helps, answer in plain text."
)
CALLS = (
    '<tool_call>[{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}, '
    '{"name": "add", "arguments": {"a": 1.5, "b": -2}}]</tool_call>'
)


def said(chat: list[Message], *tools: Tool) -> list[Any]:
    return [(m["role"], m["content"]) for m in prompted(checked(chat), tools)]


def test_tools_stand_in_the_system_message() -> None:
    assert said(turns("Hi"), SUB) == [("system", LINES), ("user", "Hi")]
    chat = [say("system", "Be brief."), *turns("Hi")]
    assert said(chat, SUB) == [("system", f"Be brief.\n\n{LINES}"), ("user", "Hi")]


def test_calls_and_results_are_turns_of_assistant_and_user() -> None:
    chat = [*answered([ROME, SUM], "sunny", '{"sum": -0.5}'), say("user", "Thanks")]
    results = (
        'Results of the functions:\n{"name": "get_weather", "content": "sunny"}\n'
        '{"name": "add", "content": {"sum": -0.5}}'
    )
    assert said(chat) == [
        ("user", "Please"),
        ("assistant", CALLS),
        ("user", f"{results}\n\nThanks"),
    ]


def test_odd_histories() -> None:
    assert said([*asked(ROME, SUM, text="I look"), *turns("Well?")])[1] == ("assistant", CALLS)
    broken = asked({**ROME, "arguments": '{"ci'})
    assert said(broken)[1][1].endswith(r'"arguments": "{\"ci"}]</tool_call>')
    without = asked({**ROME, "arguments": ""})
    assert said(without)[1][1].endswith('"arguments": {}}]</tool_call>')
    assert said(turns("a", "", "b"), SUB)[1:] == [("user", "a"), ("user", "b")]


def test_chats_without_tools_stay_as_they_are() -> None:
    chat = turns("a", "", "b")
    assert prompted(checked(chat), ()) == chat


def test_a_call_renders_to_the_ids_that_were_generated(
    all_tokenizers: dict[str, Tokenizer],
) -> None:
    for name in ("v1", "byte-level", "bytes"):
        tokenizer = all_tokenizers[name]
        for arguments in ('{"city": "Rome", "days": 3}', '{\n  "city": "\\u00fc",\n  "days": 3}'):
            chat = asked({**ROME, "arguments": arguments})
            prompt = tokenizer.chat(chat[:1], tools=[SUB])
            text = f'<tool_call>[{{"name": "get_weather", "arguments": {arguments}}}]</tool_call>'
            opening = len(tokenizer.encode(""))
            generated = [*tokenizer.encode(text)[opening:], min(tokenizer.eos_ids)]
            following = tokenizer.chat([*chat, result(ROME["id"], "1")], tools=[SUB])
            assert following[: len(prompt) + len(generated)] == prompt + generated, name


def test_the_schema_is_written_as_it_was_sent() -> None:
    schema = {"type": "object", "properties": {"b": {"enum": ["ü"]}, "a": {}}}
    tool = Tool("f", parameters=json.dumps(schema))
    assert '"parameters": ' + json.dumps(schema, ensure_ascii=False) in said(turns("x"), tool)[0][1]


def test_a_template_without_system_messages_has_tools_in_the_users(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    )
    tokenizer = load(write(tmp_path, SPECS["byte-level"], template))
    text = tokenizer.decode(tokenizer.chat(turns("a", "b", "c"), tools=[SUB]))
    assert text == f"[user] {LINES}\n\na\n[assistant] b\n[user] c\n"
