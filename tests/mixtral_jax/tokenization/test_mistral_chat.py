"""Prompts with tools, calls and results have the ids of mistral-common."""

import json
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as Reference

from mixtral_jax.errors import ChatError
from mixtral_jax.tokenization.messages import Message, Tool
from mixtral_jax.tokenization.tokenizer import Tokenizer
from tests.support.tokenizers import ATTACKS, MISTRAL_NAMES, say, turns
from tests.support.tools import ROME, SUM, TOOLS, answered, asked, result

NAMES = [name for name in MISTRAL_NAMES if name != "v1"]
PARALLEL = [name for name in NAMES if name != "v2"]
each = pytest.mark.parametrize("version", NAMES)


@pytest.fixture(scope="module")
def references(mistral_files: dict[str, Path]) -> dict[str, Any]:
    return {version: Reference.from_file(str(path)) for version, path in mistral_files.items()}


def theirs(reference: Any, chat: list[Message], tools: tuple[Tool, ...]) -> list[int]:
    """mistral-common's ids of a chat in OpenAI's form."""
    messages: list[dict[str, Any]] = []
    names = {call["id"]: call["name"] for call in (ROME, SUM)}
    for message in chat:
        made: dict[str, Any] = {"role": message["role"], "content": message["content"]}
        if calls := message.get("tool_calls"):
            made["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
                for call in calls
            ]
        if message["role"] == "tool":
            made["tool_call_id"] = message["tool_call_id"]
            made["name"] = names[message["tool_call_id"]]
        messages.append(made)
    functions = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(tool.parameters),
            },
        }
        for tool in tools
    ]
    request = ChatCompletionRequest.from_openai(messages, functions or None)
    ids: list[int] = reference.encode_chat_completion(request).tokens
    return ids


def test_a_call_is_known_by_heart(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["v3"]
    ids = tokenizer.chat(answered([ROME], "1"), tools=TOOLS)
    began = ids.index(5)
    # [TOOL_CALLS] _[ {" name ": _"
    assert ids[began : began + 6] == [5, 1501, 7567, 1629, 2032, 1113]
    assert ids[ids.index(8) + 1 :] == [
        *tokenizer.encode('{"content": 1, "call_id": "abcDEF123"}')[1:],
        9,  # [/TOOL_RESULTS]
    ]


ODD = '{"a": "ü\\n\\"[TOOL_CALLS]</s>", "b": [1, 2.5, null, {"c": true}]}'
CHATS = {
    "asked": turns("Hello"),
    "later": [*turns("Hello", "Hi", "Weather?")],
    "no result": [*asked(ROME), say("user", "Well?")],
    "answered": answered([ROME], "sunny"),
    "system": [say("system", "Be brief."), *answered([ROME], "sunny")],
    "an object": answered([ROME], '{"sky":  "blue", "degrees": 21.50}'),
    "a list": answered([ROME], "[1, 2]"),
    "a number": answered([ROME], "21"),
    "nothing": answered([ROME], ""),
    "unicode": answered([{**ROME, "arguments": ODD}], "你好 🙂"),
    "unparsable": answered([{**ROME, "arguments": '{"city": "Ro'}], "[1, "),
    "no arguments": answered([{**ROME, "arguments": ""}], "x"),
    "then a user": [*answered([ROME], "sunny"), say("assistant", "Sun."), say("user", "Ok")],
    "a user at once": [*answered([ROME], "sunny"), say("user", "Ok")],
    "twice": [*answered([ROME], "sunny"), *asked(SUM)[1:], result(SUM["id"], "3")],
    "attacks": answered([{**ROME, "arguments": json.dumps(ATTACKS)}], " ".join(ATTACKS)),
}


@each
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())
@pytest.mark.parametrize("tools", [(), TOOLS], ids=["", "tools"])
def test_ids_with_tools_are_mistral_commons(
    version: str,
    chat: list[Message],
    tools: tuple[Tool, ...],
    all_tokenizers: dict[str, Tokenizer],
    references: dict[str, Any],
) -> None:
    expected = theirs(references[version], chat, tools)
    assert all_tokenizers[version].chat(chat, tools=tools) == expected


@pytest.mark.parametrize("version", PARALLEL)
def test_two_calls_at_once_are_mistral_commons(
    version: str, all_tokenizers: dict[str, Tokenizer], references: dict[str, Any]
) -> None:
    chat = answered([ROME, SUM], "sunny", "-0.5")
    assert all_tokenizers[version].chat(chat, tools=TOOLS) == theirs(
        references[version], chat, TOOLS
    )


def test_two_calls_at_once_are_two_turns_in_v2(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["v2"]
    one_by_one = [*answered([ROME], "sunny"), *answered([SUM], "-0.5")[1:]]
    results = [result(SUM["id"], "-0.5"), result(ROME["id"], "sunny")]
    assert tokenizer.chat([*asked(ROME, SUM), *results], tools=TOOLS) == tokenizer.chat(
        one_by_one, tools=TOOLS
    )


def echoed(arguments: str) -> str:
    """Arguments as a client sends them back that has parsed them: compact, ASCII alone."""
    return json.dumps(json.loads(arguments), separators=(",", ":"))


@each
@pytest.mark.parametrize("arguments", ['{"city": "Rome", "days": 3}', ODD, "{}"])
def test_in_a_loop_of_tools_the_call_renders_to_the_ids_that_were_generated(
    version: str, arguments: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[version]
    chat = asked({**ROME, "arguments": arguments})
    prompt = tokenizer.chat(chat[:1], tools=TOOLS)
    with_result = tokenizer.chat([*chat, result(ROME["id"], "1")], tools=TOOLS)
    (eos,) = tokenizer.eos_ids
    generated = with_result[len(prompt) : with_result.index(eos, len(prompt)) + 1]
    returned = asked({**ROME, "arguments": echoed(arguments)})
    following = tokenizer.chat([*returned, result(ROME["id"], "sunny")], tools=TOOLS)
    assert following[: len(prompt) + len(generated)] == prompt + generated


@each
def test_ids_of_any_form_are_the_same_in_call_and_result(
    version: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[version]
    for call_id in (
        "call_9f-3_7",
        "x",
        "null",
        "abcDEF1234",
        "日本",
        "toolu_01A09q90qw90lq917835lq9",
    ):
        chat = [*asked({**ROME, "id": call_id}), result(call_id, "sunny")]
        text = tokenizer.decode(tokenizer.chat(chat))
        if "call_id" in text:
            sent = text[text.index('"call_id": "') + 12 :][:9]
            assert sent.isalnum()
            assert text.count(f'"{sent}"') == 2


@each
def test_text_beside_calls(version: str, all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers[version]
    results = [result(ROME["id"], "1")]
    with_text = tokenizer.chat([*asked(ROME, text="I look"), *results])
    without = tokenizer.chat([*asked(ROME), *results])
    if version in ("v2", "v3", "tekken-v3"):  # these have one or the other
        assert with_text == without
    else:
        assert len(with_text) > len(without)
    apart = [*turns("Please", "I look"), *asked(ROME)[1:], *results]
    assert tokenizer.chat(apart) == with_text


@each
def test_empty_answers_and_missing_results(
    version: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[version]
    assert tokenizer.chat(turns("a", "", "b")) == tokenizer.chat([*turns("a"), *turns("b")])
    # A call without its result, then the conversation goes on.
    chat = [*asked(ROME), say("assistant", "Sorry."), say("user", "Why?"), *asked(SUM)[1:]]
    assert tokenizer.chat([*chat, say("user", "x")], tools=TOOLS)


@each
def test_values_that_no_parser_takes_are_text(
    version: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = all_tokenizers[version]
    for odd in ("[" * 5000, "1" * 5000, '"\\ud800"', "{" * 200 + "}" * 200, "NaN"):
        chat = answered([{**ROME, "arguments": odd}], odd)
        text = tokenizer.decode(tokenizer.chat(chat))
        assert odd.replace('"', '\\"').replace("\\u", "\\\\u") in text or odd in text


@pytest.mark.parametrize(
    ("tool", "complaint"),
    [
        (Tool("get weather"), r"tools\[1\] has the name 'get weather'"),
        (Tool(""), r"tools\[1\] has the name ''"),
        (Tool("x" * 65), r"tools\[1\] has the name 'x+'"),
        (Tool("get_weather"), r"tools\[1\] has the name 'get_weather', as a tool before it"),
        (Tool("f", parameters="{"), r"parameters of tools\[1\] \(f\) are no JSON object"),
        (Tool("f", parameters="[]"), r"parameters of tools\[1\] \(f\) are no JSON object"),
        (Tool("f", description="\ud800"), r"description of tools\[1\] has half of a surrogate"),
    ],
)
@pytest.mark.parametrize("name", ["v1", "v3", "byte-level", "bytes"])
def test_wrong_tools_are_named(
    name: str, tool: Tool, complaint: str, all_tokenizers: dict[str, Tokenizer]
) -> None:
    with pytest.raises(ChatError, match=complaint):
        all_tokenizers[name].chat(turns("x"), tools=[TOOLS[0], tool])


def test_names_with_dots_are_rendered(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["v3"]
    text = tokenizer.decode(tokenizer.chat(turns("x"), tools=[Tool("files.read")]))
    assert '{"name": "files.read", "description": "", "parameters": {}}' in text
