"""Chunks of several tokens say, put together, what those of one token say."""

import random

import pytest

from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from serving.proto import inference_pb2 as pb
from serving.scheduling.request import Drawn, Event, FinishReason
from serving.service.answer.choice_text import AnswerText, Stops
from serving.service.answer.pace import MAX_TOKENS, Pace
from tests.serving.service.answer.test_choice_text import REQUEST

TEXT = "In the café, 3 € and a 🎹: the END"


def events(text: str) -> list[Event]:
    """A token a byte; the last one ends the choice."""
    ids = ByteTokenizer().encode(text, with_special=False)
    return [
        Event(
            request_id="a",
            choice=0,
            drawn=Drawn(token_id=token, logprob=-0.5),
            finish_reason=FinishReason.LENGTH if place == len(ids) - 1 else None,
            cached=32,
        )
        for place, token in enumerate(ids)
    ]


def chunks(came: list[float | None], pace: Pace, stop: tuple[str, ...]) -> list[pb.GenerateChunk]:
    """The chunks of TEXT; `came` has when the next token came, for each, None where not yet."""
    answer = AnswerText(REQUEST, ByteTokenizer(), Stops(stop), continues=False, pace=pace)
    sent = []
    for event, next_came in zip(events(TEXT), came, strict=True):
        if not answer.has_ended:
            answer.push(event, 0.0)
            sent += answer.chunks(next_came)
    return sent


def joined(sent: list[pb.GenerateChunk]) -> tuple[object, ...]:
    return (
        "".join(chunk.text for chunk in sent),
        [token for chunk in sent for token in chunk.token_ids],
        [round(score.logprob, 3) for chunk in sent for score in chunk.logprobs],
        [chunk.cached_tokens for chunk in sent if chunk.cached_tokens],
        sent[-1].finish_reason,
        sent[-1].stop_text,
        sent[-1].usage.completion_tokens,
        [chunk.HasField("usage") for chunk in sent].count(True),
    )


@pytest.mark.parametrize("stop", [(), ("END",), ("€ and", "zzz")])
@pytest.mark.parametrize("interval", [1, 3, 10])
def test_chunks_of_several_tokens_say_what_chunks_of_one_say(
    stop: tuple[str, ...], interval: int
) -> None:
    size = len(events(TEXT))
    alone = chunks([None] * size, Pace(), stop)
    for seed in range(20):
        dice = random.Random(seed)
        came = [dice.choice([0.0, 0.01, None]) for _ in range(size)]
        together = chunks(came, Pace(interval), stop)
        assert joined(together) == joined(alone)
        assert len(together) <= len(alone)


def sizes(came: list[float | None], pace: Pace) -> list[int]:
    """Tokens of each chunk of a text without half characters."""
    tokens = events("x" * len(came))
    answer = AnswerText(REQUEST, ByteTokenizer(), Stops(), continues=False, pace=pace)
    sent = []
    for event, next_came in zip(tokens, came, strict=True):
        answer.push(event, 0.0)
        sent += answer.chunks(next_came)
    return [len(chunk.token_ids) for chunk in sent]


def test_the_first_token_goes_at_once_and_later_ones_in_fours() -> None:
    assert MAX_TOKENS == 4
    assert sizes([0.0] * 10, Pace()) == [1, 4, 4, 1]
    assert sizes([None] * 5, Pace()) == [1] * 5
    assert sizes([0.0, 0.0, 0.06, 0.06, None], Pace()) == [1, 2, 1, 1]  # 60 ms later: not with it
    assert sizes([None] * 8, Pace(3)) == [1, 3, 3, 1]
    assert sizes([0.0] * 8, Pace(6)) == [1, 6, 1]
