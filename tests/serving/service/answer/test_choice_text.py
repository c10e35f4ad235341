"""Chunks of an answer, from events that are written by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.matcher import Guide
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from serving.proto import inference_pb2 as pb
from serving.scheduling.request import Drawn, Event, FinishReason, Request
from serving.service.answer.choice_text import AnswerText
from serving.service.answer.form import AnswerForm

REQUEST = Request(
    id="a",
    prompt_ids=(1,) * 90,
    sampling=SamplingParams(),
    max_tokens=3,
    eos_ids=frozenset(),
)


def event(token: int | None, computed: int, reason: FinishReason | None = None) -> Event:
    drawn = None if token is None else Drawn(token_id=token)
    return Event(
        request_id="a", choice=0, drawn=drawn, finish_reason=reason, computed=computed, cached=32
    )


def test_cached_tokens_are_told_before_the_end() -> None:
    """With each part of the prompt and with the first token, for whoever leaves after that."""
    tokenizer = ByteTokenizer()
    a, b, c = tokenizer.encode("abc")[-3:]
    answer = AnswerText(REQUEST, tokenizer, (), continues=False)
    events = (event(None, 64), event(a, 90), event(b, 90), event(c, 90, FinishReason.LENGTH))
    chunks = [answer.push(each) for each in events]
    assert all(chunk is not None for chunk in chunks)
    told = [(c.computed_tokens, c.cached_tokens, c.text) for c in chunks if c is not None]
    assert told == [(64, 32, ""), (0, 32, "a"), (0, 0, "b"), (0, 0, "c")]
    last = chunks[-1]
    assert last is not None and last.usage.cached_tokens == 32


def held(
    text: str,
    *,
    stop: Sequence[str] = (),
    last: int | None = None,
    reason: FinishReason = FinishReason.STOP,
    violation: Callable[[str], str | None] | None = None,
) -> tuple[AnswerText, list[pb.GenerateChunk]]:
    """The chunks of an answer that is held to a form, whose last token is the model's end."""
    tokenizer = ByteTokenizer()
    form = AnswerForm(Form(Guide(tokenizer, tokenizer.vocab_size).matcher("start: /.*/")))
    answer = AnswerText(
        REQUEST, tokenizer, stop, continues=False, form=replace(form, violation=violation)
    )
    tokens = [tokenizer.encode(letter)[-1] for letter in text]
    end = min(tokenizer.eos_ids) if last is None else last
    chunks = []
    for event_ in (*(event(token, 90) for token in tokens), event(end, 90, reason)):
        if not answer.has_ended:
            chunks.append(answer.push(event_))
    return answer, [chunk for chunk in chunks if chunk is not None]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({}, pb.FINISH_REASON_STOP),
        ({"stop": ["1"]}, pb.FINISH_REASON_LENGTH),
        ({"last": 100}, pb.FINISH_REASON_LENGTH),  # a stop id of the caller's
        ({"reason": FinishReason.LENGTH}, pb.FINISH_REASON_LENGTH),
    ],
    ids=["end", "stop text", "stop id", "length"],
)
def test_an_answer_with_a_form_is_whole_at_its_own_end_alone(case: Any, reason: int) -> None:
    answer, chunks = held('{"a": 1}', **case)
    assert chunks[-1].finish_reason == reason
    assert chunks[-1].usage.completion_tokens == (7 if "stop" in case else 9)


def test_a_whole_answer_is_checked_against_what_is_not_enforced() -> None:
    def wrong(text: str) -> str:
        return f"{text} is wrong"

    answer, _ = held("[1]", violation=wrong)
    assert answer.needs_check and answer.violation(0) == "[1] is wrong"
    answer, _ = held("[1]", violation=wrong, stop=["]"])
    assert answer.violation(0) is None
    answer, _ = held("[1]")
    assert not answer.needs_check and answer.violation(0) is None
