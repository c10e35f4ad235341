"""The messages of a chat."""

from typing import Any

import pytest

from serving.errors import InvalidParameter
from serving.gateway.dialect.chat.messages import SAFETY_PROMPT
from serving.proto import inference_pb2 as pb
from tests.support.chats import HELLO, asked


def test_roles_and_contents() -> None:
    request = asked(
        messages=[
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "name": None,
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "tool_calls": None},
            {"role": "system", "content": ""},
        ]
    )
    said = [(message.role, message.content) for message in request.chat.messages]
    assert said == [("system", "be brief"), ("user", "a\nb"), ("assistant", ""), ("system", "")]


def test_messages_may_carry_what_clients_keep_in_them() -> None:
    """A delta that was stored as it came, and what LangChain and .NET add."""
    stored = {"role": "assistant", "content": None, "tool_calls": [], "index": 0, "name": None}
    request = asked(messages=[*HELLO, stored, {"role": "user", "content": "b", "wine": "red"}])
    assert [message.content for message in request.chat.messages] == ["hello", "", "b"]


def test_a_safe_prompt_begins_with_mistrals_own() -> None:
    def said(**parameters: Any) -> list[tuple[str, str]]:
        chat = asked(safe_prompt=True, **parameters).chat
        return [(message.role, message.content) for message in chat.messages]

    assert SAFETY_PROMPT.startswith("Always assist with care, respect, and truth.")
    assert said() == [("system", SAFETY_PROMPT), ("user", "hello")]
    with_system = [{"role": "system", "content": "be brief"}, *HELLO]
    assert said(messages=with_system) == [
        ("system", f"{SAFETY_PROMPT}\n\nbe brief"),
        ("user", "hello"),
    ]


def test_a_prefix_is_the_beginning_of_the_answer() -> None:
    begun = {"role": "assistant", "content": "Once", "prefix": True}
    chat = asked(messages=[*HELLO, begun]).chat
    assert chat.continue_last
    assert chat.messages[-1].content == "Once"
    assert not asked(messages=[*HELLO, begun | {"prefix": False}]).chat.continue_last


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_calls_and_their_results() -> None:
    stored = {"index": 0, "function": {"name": "g", "arguments": {"b": "é"}}}
    chat = asked(
        messages=[
            *HELLO,
            {"role": "assistant", "content": "I look.", "tool_calls": [CALL, stored]},
            {"role": "tool", "tool_call_id": "abcdefghi", "content": "12", "name": None},
            {
                "role": "tool",
                "tool_call_id": "call_xyz",
                "content": [{"type": "text", "text": "5"}],
            },
            {"role": "tool", "tool_call_id": "call_xyz"},
            {"role": "assistant", "content": None, "refusal": "I cannot."},
        ]
    ).chat
    said, first, second, third, refused = chat.messages[1:]
    assert said == pb.ChatMessage(
        role="assistant",
        content="I look.",
        tool_calls=[
            pb.ToolCall(id="abcdefghi", name="f", arguments='{"a": 1}'),
            pb.ToolCall(name="g", arguments='{"b": "é"}'),
        ],
    )
    assert first == pb.ChatMessage(role="tool", content="12", tool_call_id="abcdefghi")
    assert (second.content, second.tool_call_id) == ("5", "call_xyz")
    assert (third.content, refused.content) == ("", "I cannot.")


@pytest.mark.parametrize("arguments", ["{", "", None])
def test_arguments_may_be_whatever_a_model_wrote(arguments: str | None) -> None:
    call = {"id": "a", "function": {"name": "f", "arguments": arguments}}
    chat = asked(messages=[*HELLO, {"role": "assistant", "tool_calls": [call]}]).chat
    assert chat.messages[1].tool_calls[0].arguments == (arguments or "")


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "tool_calls"),
        ({"role": "tool", "content": "a"}, "tool_call_id"),
        ({"role": "tool", "content": "a", "tool_call_id": ""}, "tool_call_id"),
        ({"role": "tool", "content": "a", "tool_call_id": "a" * 8193}, "tool_call_id"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "tool_calls.0.function"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "tool_calls.0.function.name"),
        ({"role": "assistant", "tool_calls": [CALL] * 129}, "tool_calls"),
    ],
)
def test_mistakes_in_calls_are_named(message: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        asked(messages=[*HELLO, message])
    (problem,) = caught.value.problems
    assert ".".join(problem.path) == f"body.messages.1.{path}"
