"""Prompts that no context holds are refused by the gateway itself."""

import pytest

from serving.errors import ContextTooLong, InvalidParameter, Problem
from serving.gateway.dialect.error_body import openai_error
from serving.gateway.dialect.prompt_size import at_place, check_prompts
from serving.proto import inference_pb2 as pb

MODEL = pb.ModelInfo(max_context=8, max_prompt_bytes=20)


def chat(*texts: str) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role="user", content=text) for text in texts]
    return pb.GenerateRequest(chat=pb.Chat(messages=messages))


def tools(*texts: str) -> pb.GenerateRequest:
    """A chat of 20 bytes or more whose texts all stand beside the messages' content."""
    name, description, parameters, call, called, arguments, result = texts
    tool = pb.Tool(name=name, description=description, parameters=parameters)
    calls = [pb.ToolCall(id=call, name=called, arguments=arguments)]
    messages = [
        pb.ChatMessage(role="assistant", tool_calls=calls),
        pb.ChatMessage(role="tool", tool_call_id=result, content="four"),
    ]
    return pb.GenerateRequest(chat=pb.Chat(messages=messages, tools=[tool]))


@pytest.mark.parametrize(
    ("most", "more"),
    [
        (pb.GenerateRequest(text="a" * 20), pb.GenerateRequest(text="a" * 21)),
        (pb.GenerateRequest(text="\u00e9" * 10), pb.GenerateRequest(text="\u00e9" * 11)),
        (chat("a" * 10, "b" * 10), chat("a" * 10, "b" * 11)),
        *[
            (tools(*["ab"] * 7), tools(*["abcde" if place == i else "ab" for i in range(7)]))
            for place in range(7)
        ],
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 8)),
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 9)),
        ),
    ],
    ids=["text", "two bytes a letter", "chat", *[f"tools {i}" for i in range(7)], "ids"],
)
def test_a_prompt_has_so_many_bytes_or_ids(
    most: pb.GenerateRequest, more: pb.GenerateRequest
) -> None:
    check_prompts([most, most], MODEL)
    with pytest.raises(ContextTooLong):
        check_prompts([most, more], MODEL)


def test_a_service_that_does_not_tell_its_bytes_decides_itself() -> None:
    check_prompts([pb.GenerateRequest(text="a" * 10_000)], pb.ModelInfo(max_context=8))


@pytest.mark.parametrize("field", ["text", "token_ids"])
def test_a_refused_prompt_is_named_by_its_place(field: str) -> None:
    text = f"{field} holds 300; ids are below 261"
    error = InvalidParameter(text, [Problem("Invalid input", ("body", field), text, None)])
    placed = at_place(error, 2)
    assert isinstance(placed, InvalidParameter)
    assert str(placed) == "prompt[2] holds 300; ids are below 261"
    assert openai_error(placed).error.param == "prompt[2]"
    other = InvalidParameter("n is 9", [Problem("Invalid input", ("body", "n"), "n is 9", None)])
    assert at_place(other, 2) is other
