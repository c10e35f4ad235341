"""Content blocks of Anthropic's API, and the messages that they become."""

import re
from pathlib import Path
from typing import Any

import pytest

from serving.errors import InvalidParameter, UnsupportedParameter
from serving.gateway.dialect.anthropic.content import Turn, conversation
from serving.proto import inference_pb2
from tests.serving.gateway.dialect.anthropic.test_request import asked, request

Said = tuple[str, str]


def said(messages: list[Any], **body: Any) -> list[Said]:
    """Returns the roles and contents of the chat of a conversation."""
    turns = asked(messages=messages, **body).chat.messages
    return [(turn.role, turn.content) for turn in turns]


def of(role: str, *blocks: Any) -> dict[str, Any]:
    return {"role": role, "content": list(blocks)}


def text(content: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": content} | fields


def use(call_id: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "f", "input": arguments}


def result(call_id: str, content: Any = None, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content} | fields


HELLO = {"role": "user", "content": "hello"}


def test_texts() -> None:
    assert said([HELLO], system="be brief") == [("system", "be brief"), ("user", "hello")]
    cached = text("b", cache_control={"type": "ephemeral", "ttl": "1h"}, citations=[{}])
    assert said([of("user", text("a"), cached)], system=[text("s"), text("t")]) == [
        ("system", "s\nt"),
        ("user", "a\nb"),
    ]


def test_turns_of_one_role_are_one() -> None:
    assert said([HELLO, HELLO, of("assistant", text("x")), of("assistant", text("y")), HELLO]) == [
        ("user", "hello\nhello"),
        ("assistant", "x\ny"),
        ("user", "hello"),
    ]
    system = {"role": "system", "content": "later"}
    assert said([system, HELLO], system="first") == [("system", "first\nlater"), ("user", "hello")]


def test_empty_texts_before_others_begin_no_line() -> None:
    assert said([of("user", text(""), text("a"), text(""), text("b"))]) == [("user", "a\n\nb")]
    assert said([of("user", text("\n"), text("a"))]) == [("user", "\n\na")]
    assert said([of("user", text(""), text(""))]) == [("user", "")]


def test_a_message_of_many_blocks_holds_their_text_once() -> None:
    """A proto would hold all that its content ever was: of these blocks 330 MB, and not 130 KB."""
    turns = [Turn.model_validate(of("user", *[text("a" * 31)] * 1024))] * 4
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = peak_bytes()
    chat = conversation(turns, None)
    assert len(chat.messages[0].content) == 4 * 1024 * 32 - 1
    assert peak_bytes() - before < 2**26


def peak_bytes() -> int:
    """Returns the most memory of this process that was resident at a time."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) * 1024


def test_a_systems_message_within_a_conversation_is_text_of_the_user() -> None:
    system = {"role": "system", "content": "be brief"}
    told = "<system>\nbe brief\n</system>"
    assert said([HELLO, system]) == [("user", f"hello\n{told}")]
    answer = {"role": "assistant", "content": "x"}
    assert said([system, HELLO, answer, system, HELLO]) == [
        ("system", "be brief"),
        ("user", "hello"),
        ("assistant", "x"),
        ("user", f"{told}\nhello"),
    ]
    assert said([HELLO, of("assistant", use("i")), of("user", result("i", "y")), system])[2:] == [
        ("tool", "y"),
        ("user", told),
    ]


def test_a_note_on_billing_is_no_part_of_the_prompt() -> None:
    billing = text("x-anthropic-billing-header: cc_version=2.1.197.1c0; cc_entrypoint=sdk-cli;")
    assert said([HELLO], system=[billing, text("be brief")]) == [
        ("system", "be brief"),
        ("user", "hello"),
    ]
    assert said([HELLO], system=[billing]) == [("user", "hello")]


def test_calls_and_results() -> None:
    chat = asked(
        messages=[
            HELLO,
            of("assistant", text("I look."), use("toolu_AbCdEfG12", town="Köln"), use("other")),
            of(
                "user",
                result("toolu_AbCdEfG12", [text("12"), text("rain")]),
                result("other", "no such town", is_error=True),
                text("and now?"),
            ),
        ]
    ).chat
    calls = [
        # An id of this server's loses its beginning, so that the model reads its own again.
        inference_pb2.ToolCall(id="AbCdEfG12", name="f", arguments='{"town":"Köln"}'),
        inference_pb2.ToolCall(id="other", name="f", arguments="{}"),
    ]
    message = inference_pb2.ChatMessage
    assert list(chat.messages) == [
        message(role="user", content="hello"),
        message(role="assistant", content="I look.", tool_calls=calls),
        message(role="tool", content="12\nrain", tool_call_id="AbCdEfG12"),
        message(role="tool", content="Error: no such town", tool_call_id="other"),
        message(role="user", content="and now?"),
    ]
    assert not chat.continue_last


def test_thinking_is_left_out() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    redacted = {"type": "redacted_thinking", "data": "x"}
    assert said([HELLO, of("assistant", thought, redacted, text("x")), HELLO]) == [
        ("user", "hello"),
        ("assistant", "x"),
        ("user", "hello"),
    ]


def test_the_assistants_last_word_is_continued() -> None:
    begun = {"role": "assistant", "content": "The capital"}
    assert asked(messages=[HELLO, begun]).chat.continue_last
    assert not asked(messages=[HELLO, begun, HELLO]).chat.continue_last
    assert not asked(messages=[HELLO, of("assistant")]).chat.continue_last


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "source": {"type": "url", "url": "http://a"}},
        {"type": "document", "source": {"type": "text", "data": "a"}},
        {"type": "search_result", "content": [], "source": "", "title": ""},
        {"type": "container_upload", "file_id": "f"},
        {"type": "server_tool_use", "id": "i", "name": "web_search", "input": {}},
    ],
)
def test_what_no_text_model_reads_is_refused_by_name(block: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameter, match=f"'{block['type']}'"):
        request(messages=[of("user", block)])
    with pytest.raises(UnsupportedParameter, match=f"'{block['type']}'"):
        request(messages=[of("user", result("i", [block]))])


@pytest.mark.parametrize(
    ("messages", "place", "words"),
    [
        ([of("user", use("i"))], "messages.0.content", "role 'assistant'"),
        ([of("assistant", result("i"))], "messages.0.content", "role 'user'"),
        ([of("user", {"text": "a"})], "messages.0.content.0", "the block has no type; give one"),
        ([of("user", {"type": 5})], "messages.0.content.0", "type 'int'"),
        ([of("user", "a")], "messages.0.content.0", "a block is an object with a type"),
        ([of("user", {"type": "text"})], "messages.0.content.0.text.text", "Field required"),
        ([of("assistant", use("i") | {"input": "x"})], "messages.0.content.0.tool_use.input", "ob"),
        ([{"role": "robot", "content": "x"}], "messages.0.role", "'user'"),
        ([{"role": "user"}], "messages.0.content", "Field required"),
    ],
)
def test_what_is_wrong_is_named(messages: list[Any], place: str, words: str) -> None:
    with pytest.raises(InvalidParameter, match=words) as caught:
        request(messages=messages)
    assert ".".join(caught.value.problems[0].path[1:]) == place
