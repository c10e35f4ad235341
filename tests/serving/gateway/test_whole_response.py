"""Whole answers as they are sent: in pieces, between which others have their turn."""

import asyncio
import json

from starlette.types import Message, Scope

from serving.gateway.dialect.chat.response import ChatAnswer
from serving.gateway.dialect.chunks import Identity
from serving.gateway.whole_response import WholeResponse
from serving.proto import inference_pb2


def sent_of(num_choices: int, length: int) -> tuple[list[Message], int]:
    """Returns the messages of an answer, and how often another task ran meanwhile."""
    answer = ChatAnswer(Identity(id="0" * 32, created=7, model="m"))
    for choice in range(num_choices):
        answer.add([inference_pb2.GenerateChunk(choice=choice, text="x" * length)])
    answer.add([inference_pb2.GenerateChunk(usage=inference_pb2.Usage(prompt_tokens=1))])
    messages: list[Message] = []
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def send(message: Message) -> None:
        messages.append(message)

    async def receive() -> Message:
        raise AssertionError("nothing is to be received")

    async def test() -> None:
        task = asyncio.create_task(other())
        scope: Scope = {"type": "http"}
        await WholeResponse(answer)(scope, receive, send)
        task.cancel()

    asyncio.run(test())
    return messages, turns


def test_a_short_answer_is_one_message() -> None:
    (start, body), _ = sent_of(2, 10)
    assert start["status"] == 200
    headers = [
        (b"content-length", str(len(body["body"])).encode()),
        (b"content-type", b"application/json"),
    ]
    assert start["headers"] == headers
    assert not body["more_body"]
    assert [len(each["message"]["content"]) for each in json.loads(body["body"])["choices"]] == [
        10,
        10,
    ]


def test_a_long_answer_is_sent_in_pieces() -> None:
    (start, *bodies), turns = sent_of(3, 200_000)
    whole = b"".join(body["body"] for body in bodies)
    assert dict(start["headers"])[b"content-length"] == str(len(whole)).encode()
    assert len(json.loads(whole)["choices"]) == 3
    assert max(len(body["body"]) for body in bodies) < 2 * 2**16
    assert [body["more_body"] for body in bodies] == [True] * (len(bodies) - 1) + [False]
    assert turns >= len(bodies) - 1 >= 600_000 // 2**17
