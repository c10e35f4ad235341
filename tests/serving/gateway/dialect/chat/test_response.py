"""A chat's answer at once."""

import json

from serving.gateway.dialect.chat.response import ChatAnswer
from serving.gateway.dialect.chunks import Identity
from serving.proto import inference_pb2

LAST = inference_pb2.GenerateChunk(
    text="!",
    finish_reason=inference_pb2.FINISH_REASON_STOP,
    usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=2),
)
IDENTITY = Identity(id="0" * 32, created=7, model="m")


def test_a_completion_joins_its_chunks() -> None:
    answer = ChatAnswer(IDENTITY)
    answer.add([inference_pb2.GenerateChunk(text="hi"), LAST])
    assert json.loads(b"".join(answer.pieces())) == {
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
