"""A text completion's answer at once."""

import math

from serving.gateway.dialect.chunks import Identity
from serving.gateway.dialect.text.response import text_completion
from serving.proto import inference_pb2

LAST = inference_pb2.GenerateChunk(
    text="!",
    finish_reason=inference_pb2.FINISH_REASON_STOP,
    usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=2),
)
IDENTITY = Identity(id="0" * 32, created=7, model="m")


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
