"""Bodies of answers that no path through the gateway shows as well."""

import json
import math

import pytest

from serving.errors import LEAVES, InvalidParameter, Problem, ServingError
from serving.gateway.dialect.chat.response import chat_completion
from serving.gateway.dialect.chunks import Identity
from serving.gateway.dialect.error_body import error_body
from serving.gateway.dialect.text.response import text_completion
from serving.proto import inference_pb2

LAST = inference_pb2.GenerateChunk(
    text="!",
    finish_reason=inference_pb2.FINISH_REASON_STOP,
    usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=2),
)
IDENTITY = Identity(id="0" * 32, created=7, model="m")


def test_an_identity_is_32_hexadecimal_digits_and_whole_seconds() -> None:
    identity = Identity.new("m")
    assert len(identity.id) == 32
    assert set(identity.id) <= set("0123456789abcdef")
    assert isinstance(identity.created, int)
    assert identity.id != Identity.new("m").id
    assert Identity.new("m", "a request's").id == "a request's"


def test_a_completion_joins_its_chunks() -> None:
    answer = chat_completion(IDENTITY, [inference_pb2.GenerateChunk(text="hi"), LAST])
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


def test_a_text_completion_counts_the_characters_before_its_tokens() -> None:
    def chunk(text: str, logprob: float) -> inference_pb2.GenerateChunk:
        top = inference_pb2.TokenLogprob(token=b"x", logprob=-9)
        one = inference_pb2.TokenLogprob(token=text.encode(), logprob=logprob, top=[top])
        return inference_pb2.GenerateChunk(text=text, logprobs=[one])

    answer = text_completion(IDENTITY, [chunk("na\u00efve", -1), chunk(" a", -math.inf), LAST])
    assert answer.model_dump() == {
        "id": "0" * 32,
        "object": "text_completion",
        "created": 7,
        "model": "m",
        "choices": [
            {
                "text": "na\u00efve a!",
                "index": 0,
                "logprobs": {
                    "tokens": ["na\u00efve", " a"],
                    "token_logprobs": [-1, -9999],
                    "top_logprobs": [{"x": -9}, {"x": -9}],
                    "text_offset": [0, 5],
                },
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


@pytest.mark.parametrize("leaf", [ServingError, *LEAVES.values()])
def test_an_error_says_the_same_wherever_a_client_looks(leaf: type[ServingError]) -> None:
    body = error_body(leaf("what is wrong")).model_dump()
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
    (detail,) = error_body(error).model_dump()["detail"]
    assert detail == {"type": "kind", "loc": ["body", "wine"], "msg": "m", "input": shown}
