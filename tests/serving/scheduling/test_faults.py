"""Steps that did not start, pages that were lost, tokens that the host chose: worked out by hand.

Page size 4, 8 pages, 2 rows and 8 tokens a step, where a test says nothing else.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_jax.sampling_params import SamplingParams
from serving.errors import ContextTooLong, InvalidRequest, Overloaded
from serving.scheduling.request import Drawn, FinishReason, Request
from serving.scheduling.scheduler import Scheduler
from serving.scheduling.step_plan import StepPlan
from tests.serving.scheduling.plain_device import (
    commit,
    limits,
    request,
    scheduler_of,
    shape,
    step,
    told,
    with_rows,
)


def test_a_step_that_did_not_start_is_planned_again() -> None:
    scheduler = scheduler_of(request("A", 3, 3), request("B", 10, 2))
    first = scheduler.plan()
    scheduler.withdraw(first)
    again = scheduler.plan()
    assert shape(again) == shape(first) and again == first
    second = scheduler.plan()  # of which A's chunk follows the open plan's
    scheduler.withdraw(second)
    repeated = scheduler.plan()
    assert repeated == second
    commit(scheduler, again)
    scheduler.withdraw(repeated)
    third = scheduler.plan()
    assert shape(third) == shape(second)
    assert [(c.token_ids[0], c.follows) for c in third.chunks] == [(50, None), (66005, None)]


def test_without_its_newest_arrivals_a_step_goes_on() -> None:
    scheduler = scheduler_of(request("A", 3, 9))
    step(scheduler)
    scheduler.add(request("B", 3, 9))
    plan = scheduler.plan()
    scheduler.withdraw(plan)
    assert shape(scheduler.plan(without={"B"})) == [("A", 3, 1, True)]
    assert with_rows(scheduler) == ["A", "B"]  # B keeps its row and its pages


def test_what_was_withdrawn_is_charged_once() -> None:
    scheduler = scheduler_of(request("A", 3, 9))
    scheduler.withdraw(scheduler.plan())
    step(scheduler)
    (sequence,) = scheduler._rows.running
    assert sequence.turn.served == 3


def test_a_fork_whose_page_was_not_copied_begins_again() -> None:
    """The plan copied half a page for choice 1; without that copy its page holds nothing."""
    scheduler = scheduler_of(request("A", 6, 5, n=2))
    step(scheduler)
    plan = scheduler.plan()
    assert plan.copies == ((1, 2),)
    scheduler.withdraw(plan)
    again = scheduler.plan()
    assert again.copies == ()
    assert [(c.choice, c.start, len(c.token_ids)) for c in again.chunks] == [(0, 6, 1), (1, 4, 2)]
    assert again.chunks[1].seed == plan.chunks[1].seed


def test_a_withdrawn_plan_of_what_has_ended_meanwhile() -> None:
    scheduler = scheduler_of(request("A", 3, 9))
    first, second = scheduler.plan(), scheduler.plan()
    commit(scheduler, first, 99)  # its end
    scheduler.withdraw(second)
    assert not scheduler.has_work and scheduler.num_free_pages == 8


def test_only_the_newest_plan_can_be_withdrawn() -> None:
    scheduler = scheduler_of(request("A", 3, 9))
    first = scheduler.plan()
    scheduler.plan()
    with pytest.raises(AssertionError, match="newest"):
        scheduler.withdraw(first)


def test_when_the_pages_are_lost_all_go_on_from_their_tokens() -> None:
    """A has drawn 50 and 51; what the open plan drew is lost, and is drawn again with its seed."""
    sampling = SamplingParams(seed=7)
    a = request("A", 5, 9, sampling=sampling)
    scheduler = scheduler_of(a, request("B", 5, 9), request("C", 5, 9), max_step_tokens=16)
    step(scheduler, [50, 60])
    commit(scheduler, scheduler.plan(), [51, 61])
    lost = scheduler.plan()
    scheduler.requeue_all()
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 3)
    assert (scheduler.num_free_pages, scheduler.num_cached_pages) == (8, 0)
    plan = scheduler.plan()
    assert shape(plan) == [("A", 0, 7, True), ("B", 0, 7, True)]
    chunk, before = plan.chunks[0], lost.chunks[0]
    assert chunk.token_ids == (*a.prompt_ids, 50, 51)
    assert (chunk.seed, chunk.end, chunk.prompt_length) == (before.seed, before.end, 5) == (7, 7, 5)
    assert told(commit(scheduler, plan, [52, 62])) == [("A", 0, 52, None), ("B", 0, 62, None)]
    assert scheduler.preemptions == 0 and scheduler.prompt_tokens == 10


def test_lost_pages_are_not_found_again() -> None:
    scheduler = scheduler_of(request("A", range(8), 1))
    step(scheduler)
    assert scheduler.num_cached_pages == 2
    scheduler.requeue_all()
    assert (scheduler.num_free_pages, scheduler.num_cached_pages) == (8, 0)
    scheduler.add(request("B", range(8), 1))
    assert shape(scheduler.plan()) == [("B", 0, 8, True)]


def test_what_sits_a_step_out_goes_on_later() -> None:
    scheduler = scheduler_of(request("A", 2, 9), request("B", 2, 9))
    first = scheduler.plan()
    assert shape(scheduler.plan(without=["A"])) == [("B", 2, 1, True)]
    commit(scheduler, first, [50, 60])
    third = scheduler.plan()
    assert [(c.request_id, c.token_ids, c.follows) for c in third.chunks] == [
        ("A", (50,), None),
        ("B", (0,), 0),
    ]
    scheduler = scheduler_of(request("A", 2, 9), request("B", 2, 9))
    assert shape(scheduler.plan(only="B")) == [("B", 0, 2, True)]
    assert scheduler.plan(without=["A", "B"]) == StepPlan(chunks=())


def test_forced_tokens_are_computed_at_once_and_what_the_open_plan_draws_is_passed_over() -> None:
    """After A's first token, 50, only 71, 72, 73 can come."""
    scheduler = scheduler_of(request("A", 2, 9), request("B", 2, 9), max_sequences=4)
    first, second = scheduler.plan(), scheduler.plan()
    commit(scheduler, first, [50, 60])
    events = scheduler.force(0, [71, 72, 73])
    assert told(events) == [("A", 0, token, None) for token in (71, 72, 73)]
    assert all(event.drawn is not None and event.drawn.forced for event in events)
    third = scheduler.plan()
    assert [(c.request_id, c.start, c.token_ids, c.follows) for c in third.chunks] == [
        ("B", 3, (0,), 1),
        ("A", 3, (71, 72, 73), None),
    ]
    assert told(commit(scheduler, second, [51, 61])) == [("B", 0, 61, None)]
    assert told(commit(scheduler, third, [62, 74])) == [("B", 0, 62, None), ("A", 0, 74, None)]
    assert scheduler.plan().chunks[0].token_ids == (74,)


def test_forced_tokens_before_the_first_drawn_one() -> None:
    """They come while the prompt is computed; the second choice begins beside them."""
    scheduler = scheduler_of(request("A", 3, 9, n=2), max_sequences=3)
    first = scheduler.plan()
    assert told(scheduler.force(0, [71, 72])) == [("A", 0, 71, None), ("A", 0, 72, None)]
    second = scheduler.plan()
    assert shape(second) == [("A", 2, 1, True), ("A", 3, 2, True)]
    assert [chunk.choice for chunk in second.chunks] == [1, 0]
    assert commit(scheduler, first) == []
    assert told(commit(scheduler, second, [50, 73])) == [("A", 1, 50, None), ("A", 0, 73, None)]


def test_a_forced_token_that_ends() -> None:
    """Those behind it are left out, and its pages are free at once."""
    scheduler = scheduler_of(request("A", 2, 9))
    first, second = scheduler.plan(), scheduler.plan()
    commit(scheduler, first)
    events = scheduler.force(0, [71, 99, 72])
    assert told(events) == [("A", 0, 71, None), ("A", 0, 99, FinishReason.STOP)]
    assert scheduler.num_free_pages == 8
    assert commit(scheduler, second) == [] and not scheduler.has_work


def test_forced_tokens_are_cut_at_max_tokens() -> None:
    scheduler = scheduler_of(request("A", 2, 3))
    commit(scheduler, scheduler.plan())
    scheduler.plan()
    events = scheduler.force(0, [71, 72, 73])
    assert told(events) == [("A", 0, 71, None), ("A", 0, 72, FinishReason.LENGTH)]


def test_forced_tokens_share_a_step_with_answers_and_come_before_prompts() -> None:
    """8 tokens a step: B's answer has 1, then A's forced ones 7, and C's prompt none."""
    size = {"max_sequences": 3, "num_pages": 20}
    scheduler = scheduler_of(request("A", 2, 20), request("B", 2, 9), **size)
    commit(scheduler, scheduler.plan(), [50, 60])
    scheduler.add(request("C", 20, 9))
    second = scheduler.plan()
    assert shape(second) == [("A", 2, 1, True), ("B", 2, 1, True), ("C", 0, 6, False)]
    scheduler.force(0, [*range(70, 79)])
    third = scheduler.plan()
    assert shape(third) == [("B", 3, 1, True), ("A", 3, 7, False)]
    commit(scheduler, second, [51, 61, None])
    assert shape(scheduler.plan()) == [("B", 4, 1, True), ("A", 10, 2, True), ("C", 6, 5, False)]


def test_forced_tokens_make_a_step_of_answers_no_larger_than_a_token_for_each_row() -> None:
    scheduler = scheduler_of(request("A", 2, 9), request("B", 2, 9), max_sequences=3)
    commit(scheduler, scheduler.plan(), [50, 60])
    second = scheduler.plan()
    scheduler.force(0, [71, 72, 73, 74])
    assert shape(scheduler.plan()) == [("B", 3, 1, True), ("A", 3, 2, False)]
    commit(scheduler, second, [51, 61])
    assert shape(scheduler.plan()) == [("B", 4, 1, True), ("A", 5, 2, True)]


def test_a_step_with_forced_tokens_that_did_not_start_is_planned_again() -> None:
    scheduler = scheduler_of(request("A", 2, 9), max_sequences=3)
    commit(scheduler, scheduler.plan())
    second = scheduler.plan()
    scheduler.force(0, [71, 72])
    scheduler.withdraw(second)
    third = scheduler.plan()
    assert third.chunks[0].token_ids == (50, 71, 72) and third.chunks[0].samples
    scheduler.withdraw(third)
    again = scheduler.plan()
    assert again == third
    assert told(commit(scheduler, again, 73)) == [("A", 0, 73, None)]


def test_what_ended_meanwhile_is_not_forced() -> None:
    scheduler = scheduler_of(request("A", 2, 9))
    scheduler.plan()
    scheduler.cancel("A")
    assert scheduler.force(0, [71]) == [] and scheduler.num_free_pages == 8


class Counting:
    """Guesses that numbers go on one by one, at most 3 of them."""

    chance = 1.0

    def __init__(self, request: Request) -> None:
        del request

    def guess(self, tokens: Sequence[int], count: int) -> Sequence[int]:
        return [tokens[-1] + i + 1 for i in range(min(3, count))]


def test_guesses_are_kept_up_to_the_first_wrong_one() -> None:
    """11 and 12 are right, 13 is not: the device draws 20 in its place, and goes on from there."""
    scheduler = Scheduler(limits(max_sequences=4), Counting)
    scheduler.add(request("A", [1, 2], 9))
    commit(scheduler, scheduler.plan(), 10)
    plan = scheduler.plan()
    (chunk,) = plan.chunks
    assert (chunk.token_ids, chunk.start, chunk.guesses) == ((10, 11, 12, 13), 2, 3)
    assert scheduler.plan() == StepPlan(chunks=())  # its last token must be known first
    drawn = [Drawn(token_id=token) for token in (11, 12, 20)]
    assert [told([e])[0][2] for e in scheduler.commit(plan, [drawn])] == [11, 12, 20]
    (chunk,) = scheduler.plan().chunks
    assert (chunk.token_ids, chunk.start) == ((20, 21, 22, 23), 5)


def test_an_answer_ends_among_its_guesses() -> None:
    scheduler = Scheduler(limits(max_sequences=4), Counting)
    scheduler.add(request("A", [95, 96], 9))
    commit(scheduler, scheduler.plan(), 97)
    plan = scheduler.plan()
    assert plan.chunks[0].token_ids == (97, 98, 99, 100)
    events = scheduler.commit(plan, [[Drawn(token_id=token) for token in (98, 99, 100)]])
    assert told(events) == [("A", 0, 98, None), ("A", 0, 99, FinishReason.STOP)]
    assert not scheduler.has_work and scheduler.num_free_pages == 8


def test_guesses_fit_into_the_step_and_the_answer() -> None:
    """A may have 2 tokens more, the second of which follows a guess. B gets what is left of 5."""
    scheduler = Scheduler(limits(max_step_tokens=5, max_sequences=5), Counting)
    for name, max_tokens in ("A", 3), ("B", 9):
        scheduler.add(request(name, [1, 2], max_tokens))
    commit(scheduler, scheduler.plan(), 10)
    (a, b) = scheduler.plan().chunks
    assert (a.token_ids, b.token_ids) == ((10, 11), (10, 11, 12))


def state(scheduler: Scheduler) -> Any:
    """Everything that a scheduler knows, as plain values."""
    memo: dict[int, Any] = {}
    sequences = [
        {**vars(sequence), "table": vars(sequence.table), "turn": vars(sequence.turn)}
        for sequence in scheduler._sequences()
    ]
    turns = {name: vars(turn) for name, turn in scheduler._queue._turns.items()}
    queue = {k: v for k, v in vars(scheduler._queue).items() if k not in ("_turns", "_lines")}
    rows = {k: v for k, v in vars(scheduler._rows).items() if k[0] != "_" or k == "_arrivals"}
    rows["running"] = len(scheduler._rows.running)
    pool = vars(scheduler._pool)
    for sequence in sequences:
        sequence["table"] = {k: v for k, v in sequence["table"].items() if k != "_pool"}
    return deepcopy((sequences, turns, queue, rows, pool, len(scheduler._open)), memo)


@given(
    prompt=st.one_of(
        st.lists(st.integers(-2, 2**31 + 1), max_size=40).map(tuple),
        st.just(("a", "b")),
        st.just((None,)),
        st.just(None),
    ),
    n=st.integers(-1, 9),
    max_tokens=st.integers(-1, 3),
    min_tokens=st.integers(-1, 3),
    caller=st.sampled_from("ab"),
    salt=st.sampled_from([b"", b"x"]),
)
def test_what_add_refuses_changes_nothing(prompt: Any, **fields: Any) -> None:
    scheduler = scheduler_of(request("A", 6, 9, caller="a"), request("B", 6, 9, caller="b"))
    step(scheduler)
    scheduler.add(request("C", 6, 9, caller="a"))
    scheduler.plan()
    before = state(scheduler)
    asked = Request(
        id="D", prompt_ids=prompt, sampling=SamplingParams(), eos_ids=frozenset(), **fields
    )
    try:
        scheduler.add(asked)
    except (InvalidRequest, ContextTooLong, Overloaded, TypeError):
        assert state(scheduler) == before
    else:
        assert prompt and all(0 <= token < 2**31 for token in prompt) and len(prompt) < 32
        assert fields["n"] > 0 < fields["max_tokens"] and fields["min_tokens"] >= 0
        assert scheduler.num_waiting == 2


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"prompt_ids": ()}, "the prompt is empty; give at least one token"),
        ({"prompt_ids": (3, -1)}, "the prompt has an id outside 0 to 2147483647"),
        ({"prompt_ids": (3, 2**31)}, "the prompt has an id outside 0 to 2147483647"),
        ({"n": 0}, "n is 0; ask for at least 1 choice"),
        ({"max_tokens": 0}, "max_tokens is 0; ask for at least 1 token"),
        ({"min_tokens": -1}, "min_tokens is -1; it must be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], error: str) -> None:
    fields: dict[str, Any] = {"id": "A", "prompt_ids": (0, 2**31 - 1), "max_tokens": 1}
    fields |= {"sampling": SamplingParams(), "eos_ids": frozenset(), "min_tokens": 0}
    Scheduler(limits()).add(Request(**fields))
    with pytest.raises(InvalidRequest) as refused:
        Scheduler(limits()).add(Request(**{**fields, **changes}))
    assert str(refused.value) == error


def test_a_prompt_that_just_fits() -> None:
    Scheduler(limits()).add(request("A", 31, 1))
    with pytest.raises(ContextTooLong):
        Scheduler(limits()).add(request("A", 32, 1))
