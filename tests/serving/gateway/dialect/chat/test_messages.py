"""The messages of a chat."""

from typing import Any

from serving.gateway.dialect.chat.messages import SAFETY_PROMPT
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
