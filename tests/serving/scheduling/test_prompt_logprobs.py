"""Logprobs of prompts are asked of steps once for each token, whatever becomes of the pages."""

import random

import pytest

from mixtral_jax.sampling_params import SamplingParams
from serving.scheduling.request import (
    Drawn,
    Event,
    FinishReason,
    Request,
    RowDraws,
    Scored,
    TokenScore,
)
from serving.scheduling.scheduler import Scheduler
from serving.scheduling.step_plan import Chunk, Limits

LIMITS = Limits(
    num_pages=12,
    page_size=4,
    max_sequences=4,
    max_step_tokens=8,
    max_context=40,
    max_waiting=99,
)


def asking(name: str, prompt: tuple[int, ...], **changes: int | str | None) -> Request:
    values: dict[str, object] = {"max_tokens": 1, "prompt_logprobs": 0}
    return Request(
        id=name,
        prompt_ids=prompt,
        sampling=SamplingParams(temperature=0.0),
        eos_ids=frozenset(),
        **{**values, **changes},  # type: ignore[arg-type]
    )


def result(chunk: Chunk) -> RowDraws:
    """What a device would answer: every token that is drawn is 99."""
    drawn = Drawn(token_id=99) if chunk.samples else None
    if not chunk.targets:
        return drawn
    before = chunk.target_start - 1 - chunk.start  # the token that the first target follows
    assert before >= 0 and before + len(chunk.targets) <= len(chunk.token_ids)
    known = chunk.token_ids[before + 1 : before + len(chunk.targets)]
    assert known == chunk.targets[: len(known)]
    scores = [TokenScore(token_id=token, logprob=-1.0, rank=1) for token in chunk.targets]
    return Scored(drawn, scores)


def turn(scheduler: Scheduler) -> list[Event]:
    plan = scheduler.plan()
    return scheduler.commit(plan, [result(chunk) for chunk in plan.chunks]) if plan.chunks else []


def scored(events: list[Event]) -> tuple[int, ...]:
    return tuple(score.token_id for event in events for score in event.prompt_logprobs)


def test_each_chunk_has_the_tokens_behind_its_own_as_targets() -> None:
    """A prompt of 11 in steps of 8; the last token has nothing known behind it."""
    scheduler = Scheduler(LIMITS)
    scheduler.add(asking("a", (*range(11),), prompt_logprobs=3))
    plan = scheduler.plan()
    (first,) = plan.chunks
    assert (first.target_start, first.targets, first.asked) == (1, (1, 2, 3, 4, 5, 6, 7, 8), 3)
    behind = scheduler.plan()
    assert [c.targets for c in behind.chunks] == [(9, 10)]
    (event,) = scheduler.commit(plan, [result(first)])
    assert scored([event]) == (1, 2, 3, 4, 5, 6, 7, 8) and event.computed == 8
    events = scheduler.commit(behind, [result(chunk) for chunk in behind.chunks])
    assert [(scored([e]), e.drawn is None) for e in events] == [((9, 10), True), ((), False)]


def test_without_an_answer_the_last_token_is_not_computed() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(asking("a", (*range(9),), max_tokens=0, n=2))
    (chunk,) = scheduler.plan().chunks
    assert len(chunk.token_ids) == 8 and not chunk.samples
    scheduler.withdraw(scheduler._open[-1][0])
    events = turn(scheduler)
    assert scored(events) == (1, 2, 3, 4, 5, 6, 7, 8)
    assert [(e.choice, e.finish_reason) for e in events[1:]] == [
        (0, FinishReason.LENGTH),
        (1, FinishReason.LENGTH),
    ]
    assert not scheduler.has_work and scheduler.num_free_pages == LIMITS.num_pages


def test_a_row_that_sits_out_keeps_its_scores() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(asking("a", (1, 2, 3)))
    plan = scheduler.plan()
    whole = result(plan.chunks[0])
    assert isinstance(whole, Scored)
    assert scored(scheduler.commit(plan, [Scored(None, whole.scores)])) == (2, 3)
    (again,) = scheduler.plan().chunks
    assert again.token_ids == (3,) and not again.targets and again.samples


def test_pages_of_an_earlier_prompt_are_taken_only_where_no_logprobs_are_wanted() -> None:
    scheduler = Scheduler(LIMITS)
    prompt = (*range(10),)
    for name, logprobs, cached in (("first", None, 0), ("asks", 0, 0), ("later", None, 8)):
        scheduler.add(asking(name, prompt, prompt_logprobs=logprobs))
        events = []
        while scheduler.has_work:
            events += turn(scheduler)
        assert events[-1].cached == cached, name
        assert scored(events) == (() if logprobs is None else prompt[1:])


@pytest.mark.parametrize("seed", range(20))
def test_none_is_lost_or_told_twice(seed: int) -> None:
    """Three callers take rows and pages from one another, and the device loses all its pages."""
    dice = random.Random(seed)
    scheduler = Scheduler(LIMITS)
    requests = [
        asking(
            str(i),
            tuple(dice.choices(range(50), k=dice.randint(2, 25))),
            max_tokens=dice.choice([0, 1, 14]),
            n=dice.choice([1, 1, 2]),
            caller=dice.choice("abc"),
        )
        for i in range(8)
    ]
    events: dict[str, list[Event]] = {request.id: [] for request in requests}
    waiting = list(requests)
    for _ in range(1000):
        if waiting and dice.random() < 0.3:
            scheduler.add(waiting.pop())
        if dice.random() < 0.03:
            scheduler.requeue_all()
        for event in turn(scheduler):
            events[event.request_id].append(event)
        if not waiting and not scheduler.has_work:
            break
    assert not scheduler.has_work
    for request in requests:
        own = events[request.id]
        assert scored(own) == request.prompt_ids[1:]
        first = next((i for i, event in enumerate(own) if event.drawn), len(own))
        assert not scored(own[first:])
        assert sum(event.drawn is not None for event in own) == request.n * request.max_tokens
        assert sum(event.finish_reason is not None for event in own) == request.n
