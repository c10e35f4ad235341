"""Bodies of answers that no path through the gateway shows as well."""

import json
import math

import pytest

from serving.errors import LEAVES, InvalidParameter, Problem, ServingError
from serving.gateway import reply
from serving.proto import inference_pb2

LAST = inference_pb2.GenerateChunk(
    text="!",
    finish_reason=inference_pb2.FINISH_REASON_STOP,
    usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=2),
)
IDENTITY = reply.Identity(id="0" * 32, created=7, model="m")


def test_an_identity_is_32_hexadecimal_digits_and_whole_seconds() -> None:
    identity = reply.Identity.new("m")
    assert len(identity.id) == 32
    assert set(identity.id) <= set("0123456789abcdef")
    assert isinstance(identity.created, int)
    assert identity.id != reply.Identity.new("m").id


def test_a_completion_joins_its_chunks() -> None:
    answer = reply.completion(IDENTITY, [inference_pb2.GenerateChunk(text="hi"), LAST])
    assert answer.model_dump() == {
        "id": "0" * 32,
        "object": "chat.completion",
        "created": 7,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hi!", "tool_calls": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def test_text_in_the_last_chunk_comes_before_the_end() -> None:
    text, end = reply.chunks_of(IDENTITY, LAST, include_usage=False)
    assert text.choices[0].delta.content == "!"
    assert text.choices[0].finish_reason is None
    assert text.usage is None
    assert end.choices[0].delta.content == ""
    assert end.choices[0].finish_reason == "stop"
    assert end.usage is not None


def test_a_choice_that_ends_before_others_has_no_usage() -> None:
    chunk = inference_pb2.GenerateChunk(finish_reason=LAST.finish_reason, choice=2)
    for include_usage in (False, True):
        (end,) = reply.chunks_of(IDENTITY, chunk, include_usage)
        assert end.choices[0].index == 2
        assert end.choices[0].finish_reason == "stop"
        assert end.usage is None


def test_logprobs_of_tokens_without_text_come_with_the_end() -> None:
    one = inference_pb2.TokenLogprob(token_id=9, token=b"\xc3", logprob=-0.5)
    chunk = inference_pb2.GenerateChunk(
        finish_reason=LAST.finish_reason, usage=LAST.usage, logprobs=[one]
    )
    (end,) = reply.chunks_of(IDENTITY, chunk, include_usage=False)
    assert end.choices[0].logprobs is not None
    assert end.choices[0].logprobs.model_dump() == {
        "content": [
            {"token": "\ufffd", "token_id": 9, "logprob": -0.5, "bytes": [195], "top_logprobs": []}
        ]
    }


def test_a_chunk_without_news_becomes_nothing() -> None:
    chunk = inference_pb2.GenerateChunk(token_ids=[5])
    assert list(reply.chunks_of(IDENTITY, chunk, include_usage=True)) == []


def test_an_event_is_ascii_in_one_line() -> None:
    chunk = reply.opening(IDENTITY, 0)
    chunk.choices[0].delta.content = "\u2028\x85\r\n\U0001f600é"
    line = reply.event(chunk)
    assert line.isascii()
    assert line.splitlines() == [line[:-2], b""]
    assert json.loads(line.removeprefix(b"data: "))["choices"][0]["delta"]["content"] == (
        "\u2028\x85\r\n\U0001f600é"
    )


@pytest.mark.parametrize("leaf", [ServingError, *LEAVES.values()])
def test_an_error_says_the_same_wherever_a_client_looks(leaf: type[ServingError]) -> None:
    body = reply.error_body(leaf("what is wrong")).model_dump()
    inner = body.pop("error")
    detail = body.pop("detail")
    assert inner == body
    assert (inner["code"], inner["status"]) == (leaf.azure_code, leaf.http_status)
    if leaf.http_status == 422:
        assert json.loads(inner["message"]) == {"detail": detail}
        assert detail == [
            {"type": leaf.azure_code, "loc": ["body"], "msg": "what is wrong", "input": None}
        ]
    else:
        assert inner["message"] == detail == "what is wrong"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("red", "red"),
        ({"type": "json_object"}, {"type": "json_object"}),
        (False, False),
        ("x" * 198, "x" * 198),
        ("x" * 199, None),
        (["x" * 199], None),
        (math.inf, None),
        ([math.nan], None),
        ([10**5000], None),
    ],
)
def test_only_short_values_are_shown_back(value: object, shown: object) -> None:
    error = InvalidParameter("m", [Problem("kind", ("body", "wine"), "m", value)])
    (detail,) = reply.error_body(error).model_dump()["detail"]
    assert detail == {"type": "kind", "loc": ["body", "wine"], "msg": "m", "input": shown}
