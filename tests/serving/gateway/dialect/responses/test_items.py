"""The input of the Responses API: texts, messages, calls and their outputs, as turns of a chat."""

from typing import Any

import pytest

from serving.errors import InvalidParameter, ServingError, UnsupportedParameter
from serving.proto import inference_pb2
from tests.serving.gateway.dialect.responses.test_request import asked


def turns(items: object, **parameters: Any) -> list[tuple[str, str]]:
    """Returns the roles and contents of an input's chat."""
    (call,) = asked(input=items, **parameters)
    return [(turn.role, turn.content) for turn in call.chat.messages]


def part(text: str, kind: str = "input_text") -> dict[str, str]:
    return {"type": kind, "text": text}


def test_a_text_is_the_users_message() -> None:
    assert turns("hello") == [("user", "hello")]
    assert turns("hello", instructions="be brief") == [("system", "be brief"), ("user", "hello")]


def test_messages_hold_texts_or_parts() -> None:
    items = [
        {"role": "user", "content": "one"},
        {"type": "message", "role": "user", "content": [part("two"), part("three")]},
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "four", "annotations": [], "logprobs": []}],
        },
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "developer", "content": "five"},
    ]
    assert turns(items) == [
        ("user", "one"),
        ("user", "two\nthree"),
        ("assistant", "four"),
        ("assistant", "no"),
        ("system", "five"),
    ]


def test_instructions_are_joined_with_a_system_message_that_opens_the_input() -> None:
    """One system message is all that some models take."""
    items = [{"role": "developer", "content": "two"}, {"role": "system", "content": "three"}]
    assert turns(items, instructions="one") == [("system", "one\n\ntwo"), ("system", "three")]


def test_calls_belong_to_the_message_before_them() -> None:
    call = {"type": "function_call", "id": "fc_1", "status": "completed", "namespace": None}
    items = [
        {"role": "user", "content": "weather?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {"role": "assistant", "content": "I ask."},
        call | {"call_id": "call_1", "name": "f", "arguments": '{"a": 1}'},
        call | {"call_id": "call_2", "name": "g", "arguments": "not JSON"},
        {"type": "function_call_output", "call_id": "call_1", "output": "12 degrees"},
        {"type": "function_call_output", "call_id": "call_2", "output": [part("a"), part("b")]},
        call | {"call_id": "call_3", "name": "f", "arguments": "{}"},
    ]
    (request,) = asked(input=items)
    message, made = inference_pb2.ChatMessage, inference_pb2.ToolCall
    assert list(request.chat.messages) == [
        message(role="user", content="weather?"),
        message(
            role="assistant",
            content="I ask.",
            tool_calls=[
                made(id="call_1", name="f", arguments='{"a": 1}'),
                made(id="call_2", name="g", arguments="not JSON"),
            ],
        ),
        message(role="tool", content="12 degrees", tool_call_id="call_1"),
        message(role="tool", content="a\nb", tool_call_id="call_2"),
        message(role="assistant", tool_calls=[made(id="call_3", name="f", arguments="{}")]),
    ]


@pytest.mark.parametrize(
    ("item", "kind", "text"),
    [
        ({"type": "item_reference", "id": "x"}, UnsupportedParameter, "'item_reference' are not"),
        ({"type": "web_search_call", "id": "x"}, UnsupportedParameter, "'web_search_call'"),
        ({"type": ["x"]}, UnsupportedParameter, "type 'list'"),
        ({"type": "computer_call_output"}, UnsupportedParameter, "'computer_call_output'"),
        (
            {"role": "user", "content": [{"type": "input_image"}]},
            UnsupportedParameter,
            "reads text",
        ),
        ({"role": "user", "content": [7]}, UnsupportedParameter, "reads text only"),
        ({"role": "user", "content": [{"type": "input_text"}]}, InvalidParameter, "needs a string"),
        ({"role": "tool", "content": "x"}, InvalidParameter, "'assistant'"),
        ({"role": "user"}, InvalidParameter, "Field required"),
        ({"type": "function_call", "call_id": "1", "name": "f"}, InvalidParameter, "required"),
        ({"type": "function_call_output", "call_id": "1"}, InvalidParameter, "required"),
        (7, InvalidParameter, "valid dictionary"),
    ],
)
def test_what_is_refused(item: object, kind: type[ServingError], text: str) -> None:
    with pytest.raises(kind, match=text) as raised:
        asked(input=[item])
    assert type(raised.value) is kind


@pytest.mark.parametrize("items", [None, [], 7, {"role": "user"}, [{"role": "user"}] * 4097])
def test_what_is_no_input(items: object) -> None:
    with pytest.raises(InvalidParameter):
        asked(input=items)
