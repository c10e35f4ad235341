"""An answer of the Responses API at once."""

import json
from typing import Any

import pytest
from openai.types.responses import Response

from serving.errors import InvalidRequest
from serving.gateway.dialect.chunks import Identity
from serving.gateway.dialect.responses import output
from serving.gateway.dialect.responses.response import ResponseObject, ResponsesAnswer
from serving.proto import inference_pb2
from tests.serving.gateway.dialect.responses.test_request import request

IDENTITY = Identity(id="resp_" + "0" * 32, created=7, model="m")
TOOL = {"type": "function", "name": "f", "parameters": {"title": "\u00e9"}, "strict": True}
WEATHER = inference_pb2.ToolCall(id="abcdefghi", name="f", arguments='{"town": "K\u00f6ln"}')


def last(reason: inference_pb2.FinishReason.ValueType) -> inference_pb2.GenerateChunk:
    """Returns the chunk that ends an answer of 3 tokens, of whose prompt 2 of 5 were cached."""
    spent = inference_pb2.Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=2)
    return inference_pb2.GenerateChunk(finish_reason=reason, usage=spent)


STOP = last(inference_pb2.FINISH_REASON_STOP)
LENGTH = last(inference_pb2.FINISH_REASON_LENGTH)
CALLED = last(inference_pb2.FINISH_REASON_TOOL_CALLS)


def text(content: str, *logprobs: float) -> inference_pb2.GenerateChunk:
    """Returns a chunk with a text, and the log-probabilities of tokens that are all the text."""
    tokens = [
        inference_pb2.TokenLogprob(token=content.encode(), logprob=logprob) for logprob in logprobs
    ]
    return inference_pb2.GenerateChunk(text=content, logprobs=tokens)


def calls(*made: inference_pb2.ToolCall) -> inference_pb2.GenerateChunk:
    return inference_pb2.GenerateChunk(tool_calls=made)


def whole(*chunks: inference_pb2.GenerateChunk, **body: Any) -> dict[str, Any]:
    """Returns the answer that chunks make, after openai's and our own types have read it."""
    answer = ResponsesAnswer(IDENTITY, request(**body).repeated())
    answer.add(chunks)
    written: dict[str, Any] = json.loads(b"".join(answer.pieces()))
    Response.model_validate(written)
    assert ResponseObject.model_validate(written).model_dump(exclude_unset=True) == written
    return written


def test_a_text_is_a_message() -> None:
    written = whole(text("hi"), text("\u00ef!"), STOP, tools=[TOOL], user="somebody")
    assert written == {
        "id": "resp_" + "0" * 32,
        "object": "response",
        "created_at": 7,
        "model": "m",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "store": False,
        "background": False,
        "previous_response_id": None,
        "truncation": "disabled",
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [TOOL | {"description": None}],
        "top_logprobs": 0,
        "top_p": None,
        "user": "somebody",
        "output": [
            {
                "id": "msg_" + "0" * 32 + "_0",
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [
                    {
                        "type": "output_text",
                        "annotations": [],
                        "logprobs": [],
                        "text": "hi\u00ef!",
                    }
                ],
            }
        ],
        "usage": {
            "input_tokens": 5,
            "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
            "output_tokens": 3,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 8,
        },
    }


def test_a_call_is_an_item() -> None:
    other = inference_pb2.ToolCall(id="123456789", name="g", arguments="{}")
    written = whole(text("I ask."), calls(WEATHER), calls(other), CALLED)
    assert written["status"] == "completed"
    message, first, second = written["output"]
    assert message["content"][0]["text"] == "I ask." and message["status"] == "completed"
    assert first == {
        "id": "fc_" + "0" * 32 + "_1",
        "type": "function_call",
        "status": "completed",
        "arguments": '{"town": "K\u00f6ln"}',
        "call_id": "abcdefghi",
        "name": "f",
    }
    assert (second["id"], second["call_id"]) == ("fc_" + "0" * 32 + "_2", "123456789")
    (alone,) = whole(calls(WEATHER), CALLED)["output"]
    assert alone["type"] == "function_call"


def test_a_cut_is_named() -> None:
    written = whole(text("one"), LENGTH)
    assert written["status"] == "incomplete"
    assert written["incomplete_details"] == {"reason": "max_output_tokens"}
    assert written["output"][0]["status"] == "incomplete"
    # A call that was cut is not there, and what is whole stays whole.
    written = whole(calls(WEATHER), LENGTH)
    assert written["status"] == "incomplete"
    assert [item["status"] for item in written["output"]] == ["completed"]


@pytest.mark.parametrize("end", [STOP, LENGTH])
def test_an_answer_without_text_is_an_empty_message(end: inference_pb2.GenerateChunk) -> None:
    (message,) = whole(inference_pb2.GenerateChunk(prompt_tokens=5), end)["output"]
    assert message["content"][0]["text"] == ""


def test_logprobs_stand_beside_the_text() -> None:
    included = ["message.output_text.logprobs"]
    written = whole(text("a", -1.0), text("b", -2.0, -0.5), STOP, include=included)
    found = written["output"][0]["content"][0]["logprobs"]
    assert [token["logprob"] for token in found] == [-1.0, -2.0, -0.5]
    assert found[0] == {
        "token": "a",
        "token_id": 0,
        "logprob": -1.0,
        "bytes": [97],
        "top_logprobs": [],
    }


def test_an_answer_has_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "MAX_BYTES", 1000)
    answer = ResponsesAnswer(IDENTITY, {})
    answer.add([text("x" * 1000)])
    with pytest.raises(InvalidRequest, match="more than 1,000 bytes"):
        answer.add([text("x")])
