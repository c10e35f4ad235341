"""A text completion's answer at once."""

import json
import math

import pytest

from serving.gateway.dialect.chunks import Identity
from serving.gateway.dialect.text.logprobs import text_logprobs
from serving.gateway.dialect.text.response import TextAnswer
from serving.gateway.dialect.text.stream import TextEvents
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

    answer = TextAnswer(IDENTITY)
    answer.add([chunk("na\u00efve", -1), chunk(" a", -math.inf), LAST])
    assert json.loads(b"".join(answer.pieces())) == {
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
                    "top_logprobs": [{"x": -9, "na\u00efve": -1}, {"x": -9, " a": -9999}],
                    "text_offset": [0, 5],
                },
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def pieces(*tokens: bytes) -> inference_pb2.GenerateChunk:
    """Make a chunk of tokens, each of which has another piece of a character as its rival."""
    chunk = inference_pb2.GenerateChunk()
    for place, token in enumerate(tokens):
        own = inference_pb2.TokenLogprob(token=token, logprob=-0.1 * (place + 1))
        rivals = [
            inference_pb2.TokenLogprob(token=b"\xe4", logprob=-3.0),
            inference_pb2.TokenLogprob(token=b"\x82", logprob=-4.0),
        ]
        chunk.logprobs.add(token=token, logprob=own.logprob, top=[own, *rivals])
    return chunk


def test_pieces_of_a_character_begin_where_it_does() -> None:
    columns = text_logprobs(
        pieces(b"\xe3", b"\x81", b"\x93", b"!", b"\xc3\xbf\xc3", b"\xbf", b"."), 0
    )
    assert columns["text_offset"] == [0, 0, 0, 1, 2, 3, 4]
    assert text_logprobs(pieces(b"a"), 7)["text_offset"] == [7]


def test_each_piece_of_a_character_has_a_name_of_its_own() -> None:
    columns = text_logprobs(pieces(b"\xe3", b"\x81\x93", b"!", b"\xe4"), 0)
    assert columns["tokens"] == [r"bytes:\xe3", r"bytes:\x81\x93", "!", r"bytes:\xe4"]
    rivals = {r"bytes:\xe4": -3.0, r"bytes:\x82": -4.0}
    assert columns["top_logprobs"] == [
        {r"bytes:\xe3": pytest.approx(-0.1), **rivals},
        {r"bytes:\x81\x93": pytest.approx(-0.2), **rivals},
        {"!": pytest.approx(-0.3), **rivals},
        # Of two alternatives with the same bytes the likelier one is shown.
        {**rivals, r"bytes:\xe4": pytest.approx(-0.4)},
    ]


def test_a_stream_counts_over_characters_cut_by_its_chunks() -> None:
    events = TextEvents(IDENTITY)
    offsets = [
        json.loads(events._logprobs(pieces(token)))["text_offset"]
        for token in (b"\xe3", b"\x81", b"\x93", b"!")
    ]
    assert offsets == [[0], [0], [0], [1]]
