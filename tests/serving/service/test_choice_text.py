"""Chunks of an answer, from events that are written by hand."""

from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from serving.scheduling.request import Drawn, Event, FinishReason, Request
from serving.service.choice_text import AnswerText

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
