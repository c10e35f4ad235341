"""Whole answers: what is written while chunks come are the bytes of their types."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from serving.errors import InvalidRequest
from serving.gateway.dialect import whole
from serving.gateway.dialect.chat.response import ChatAnswer
from serving.gateway.dialect.chunks import Chunks, Identity
from serving.gateway.dialect.text.response import TextAnswer
from serving.gateway.dialect.whole import WholeAnswer, check_logprobs
from serving.proto import inference_pb2
from tests.support.answers import chat_completion, text_completion

IDENTITY = Identity(id="0" * 32, created=7, model='m" \u00ef')
Twin = Callable[[Identity, Chunks], BaseModel]

TOKENS = st.builds(
    inference_pb2.TokenLogprob,
    token_id=st.integers(0, 2**32 - 1),
    token=st.one_of(st.binary(max_size=4), st.text(max_size=4).map(str.encode)),
    logprob=st.one_of(st.floats(-100, 0, width=32), st.just(float("-inf"))),
    top=st.lists(
        st.builds(
            inference_pb2.TokenLogprob,
            token_id=st.integers(0, 9),
            token=st.binary(max_size=2),
            logprob=st.floats(-100, 0, width=32),
        ),
        max_size=3,
    ),
)

CALLS = st.builds(inference_pb2.ToolCall, id=st.text(), name=st.text(), arguments=st.text())


@pytest.mark.parametrize(
    ("kind", "twin"), [(ChatAnswer, chat_completion), (TextAnswer, text_completion)]
)
@given(
    pieces=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.text(),
            st.lists(TOKENS, max_size=2),
            st.lists(CALLS, max_size=2),
        ),
        max_size=8,
    )
)
def test_the_bytes_of_an_answer_are_those_of_its_type(
    kind: type[WholeAnswer], twin: Twin, pieces: list[tuple[int, str, list[Any], list[Any]]]
) -> None:
    chunks = [
        inference_pb2.GenerateChunk(choice=choice, text=text, logprobs=logprobs, tool_calls=calls)
        for choice, text, logprobs, calls in pieces
    ]
    for choice in range(3):
        reason = inference_pb2.FINISH_REASON_LENGTH if choice else inference_pb2.FINISH_REASON_STOP
        chunks.append(inference_pb2.GenerateChunk(choice=choice, finish_reason=reason))
    chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens = 3, 4
    answer = kind(IDENTITY)
    answer.add(chunks[:2])
    answer.add(chunks[2:])
    # As Starlette's JSONResponse writes it.
    expected = json.dumps(
        twin(IDENTITY, chunks).model_dump(),
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    )
    assert b"".join(answer.pieces()).decode() == expected


def test_progress_of_a_prompt_is_no_choice() -> None:
    answer = ChatAnswer(IDENTITY)
    answer.add([inference_pb2.GenerateChunk(prompt_tokens=3)])
    answer.add([inference_pb2.GenerateChunk(computed_tokens=3, choice=2)])
    assert b'"choices":[]' in b"".join(answer.pieces())


@pytest.mark.parametrize("kind", [ChatAnswer, TextAnswer])
def test_an_answer_has_a_size(kind: type[WholeAnswer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "MAX_BYTES", 1000)
    token = inference_pb2.TokenLogprob(token=b"x", logprob=-1)
    chunk = inference_pb2.GenerateChunk(text="x", logprobs=[token])
    answer = kind(IDENTITY)
    with pytest.raises(InvalidRequest, match="more than 1,000 bytes .* 'stream': true"):
        for _ in range(1000):
            answer.add([chunk])
    assert 1000 < sum(map(len, answer.pieces())) < 1400


@pytest.mark.parametrize(
    ("number", "tokens", "top", "is_refused"),
    [(16, 512, 20, False), (1, 8192, 20, False), (16, 8192, 20, True), (16, 8192, None, False)],
)
def test_logprobs_that_would_be_too_long_are_refused_before(
    number: int, tokens: int, top: int | None, is_refused: bool
) -> None:
    call = inference_pb2.GenerateRequest(n=number, max_tokens=tokens, top_logprobs=top)
    if is_refused:
        with pytest.raises(InvalidRequest, match="67,108,864 bytes"):
            check_logprobs([call])
    else:
        check_logprobs([call])
