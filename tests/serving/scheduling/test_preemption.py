"""Who gives way for whom, worked out by hand. Sequences are named by caller and age: a0, a1, b2."""

from collections.abc import Sequence

import pytest

from serving.scheduling.pages import PagePool, PageTable
from serving.scheduling.preemption import LEAD, victims, youngest
from serving.scheduling.request import Priority
from serving.scheduling.sequence import SLICE, SequenceState, Turn
from tests.serving.scheduling.plain_device import (
    commit,
    request,
    scheduler_of,
    shape,
    step,
    with_rows,
)

POOL = PagePool(8, 4)
TURNS = {caller: Turn(caller) for caller in "abc"}


@pytest.fixture(autouse=True)
def fresh_turns() -> None:
    for caller in TURNS:
        TURNS[caller] = Turn(caller)


def sequence(name: str, drawn: int = 0, batch: bool = False, is_due: bool = False) -> SequenceState:
    """A sequence of the caller and age in its name that drew so many tokens since it has a row."""
    priority = Priority.BATCH if batch else Priority.INTERACTIVE
    asked = request(name, 3, 999, caller=name[0], priority=priority)
    return SequenceState(
        request=asked,
        turn=TURNS[name[0]],
        choice=0,
        arrival=int(name[1:]),
        seed=0,
        limit=1002,
        tokens=[*asked.prompt_ids, *range(drawn)],
        table=PageTable(POOL),
        known_at_seat=3,
        is_due=is_due,
    )


def given_way(head: SequenceState, running: Sequence[SequenceState], number: int = 1) -> list[str]:
    """Names of those that give way, where so many must."""
    chosen = victims(head, running, lambda others: len(others) == number)
    return [other.request.id for other in chosen]


def rows(*names: str, drawn: int = 0) -> list[SequenceState]:
    return [sequence(name, drawn) for name in names]


def test_a_caller_without_a_row_gets_one_from_the_caller_with_the_most() -> None:
    assert given_way(sequence("c9"), rows("a0", "b1", "a2", "a3", "b4")) == ["a3"]
    assert given_way(sequence("c9"), rows("a0", "b1", "a2", "a3", "b4"), 3) == ["a3", "b4", "a2"]


def test_the_last_row_of_a_caller_is_its_own() -> None:
    assert given_way(sequence("c9"), rows("a0", "b1")) == []
    assert given_way(sequence("c9"), rows("a0", "b1", "a2"), 2) == []  # nor is a part of it enough


def test_a_caller_with_a_row_takes_none_from_its_equals() -> None:
    assert given_way(sequence("b9"), rows("a0", "a1", "a2", "b3")) == []
    assert given_way(sequence("a9"), rows("a0", "a1", "a2")) == []


def test_a_caller_that_was_served_much_more_waits_for_its_turn() -> None:
    TURNS["c"].served = LEAD
    assert given_way(sequence("c9"), rows("a0", "a1")) == ["a1"]
    TURNS["c"].served = LEAD + 1
    assert given_way(sequence("c9"), rows("a0", "a1")) == []


def test_who_was_served_more_gives_way_after_a_slice() -> None:
    TURNS["a"].served, TURNS["b"].served = LEAD, LEAD + 1
    running = [sequence("a0", SLICE), sequence("b1", SLICE), sequence("b2", SLICE)]
    assert given_way(sequence("c9"), running, 3) == ["b2", "b1", "a0"]
    assert given_way(sequence("c9"), running[:2], 2) == ["b1", "a0"]
    running = [sequence("a0", SLICE - 1), sequence("b1", SLICE - 1)]
    assert given_way(sequence("c9"), running) == []
    TURNS["c"].served = 1
    assert given_way(sequence("c9"), [sequence("a0", SLICE)]) == []


def test_a_slice_is_longer_for_who_would_compute_much_again() -> None:
    one = sequence("a0", 0)
    one.known_at_seat = 400
    one.tokens = [0] * 499
    assert not one.had_slice
    one.tokens.append(0)
    assert one.had_slice


def test_batch_gives_way_to_interactive_of_whatever_caller() -> None:
    running = [sequence("b0", batch=True), sequence("a1", batch=True), sequence("a2")]
    assert given_way(sequence("a9"), running) == ["a1"]
    assert given_way(sequence("a9"), running, 2) == ["a1", "b0"]
    assert given_way(sequence("a9"), running, 3) == []
    assert given_way(sequence("c9", batch=True), [sequence("a1"), sequence("a2")]) == []


def test_batch_in_its_own_turn_keeps_its_row_for_a_slice() -> None:
    def of(drawn: int) -> list[str]:
        return given_way(sequence("a9"), [sequence("b0", drawn, batch=True, is_due=True)])

    assert of(SLICE - 1) == []
    assert of(SLICE) == ["b0"]


def test_when_pages_run_out_the_youngest_of_the_largest_gives_way() -> None:
    assert youngest(rows("a0", "b1", "a2", "b3", "a4", "c5")).request.id == "a4"
    assert youngest(rows("a0", "b1")).request.id == "b1"
    running = [sequence("b0", batch=True), *rows("a1", "a2", "a3")]
    assert youngest(running).request.id == "b0"


def test_a_fork_does_not_pass_an_older_sequence_that_waits() -> None:
    """A row and a page are free when A forks, but B waits for more pages and is older than it."""
    scheduler = scheduler_of(
        request("A", 6, 9, n=2), request("B", 13, 9), num_pages=6, max_sequences=3, max_waiting=9
    )
    plan = scheduler.plan()
    assert [chunk.request_id for chunk in plan.chunks] == ["A"]
    commit(scheduler, plan)
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
    assert shape(step(scheduler)) == [("A", 6, 1, True)]
    scheduler.cancel("A", 0)
    assert [chunk.request_id for chunk in step(scheduler).chunks] == ["B"]


def test_a_fork_passes_a_batch_request_that_waits() -> None:
    scheduler = scheduler_of(
        request("A", 6, 9, n=2),
        request("B", 13, 9, priority=Priority.BATCH),
        num_pages=6,
        max_sequences=3,
        max_waiting=9,
    )
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


@pytest.mark.parametrize(("pages", "running"), [(4, 2), (3, 1)])
def test_a_fork_needs_a_page_beside_those_kept_back(pages: int, running: int) -> None:
    """A's prompt holds 2 pages; one more is kept back for it, and the fork takes another."""
    scheduler = scheduler_of(request("A", 6, 3, n=2), num_pages=pages)
    step(scheduler)
    assert scheduler.num_running == running


def test_another_callers_request_passes_one_that_waits_for_pages() -> None:
    """A holds 5 pages of 8, and B needs 4; C needs 1 and gets it, until it is far ahead of B."""
    scheduler = scheduler_of(
        request("A", 18, 9, caller="a"),
        request("B", 13, 9, caller="b"),
        request("C", 2, 9, caller="c"),
        request("D", 2, 9, caller="b"),
        max_sequences=4,
        max_step_tokens=32,
        max_waiting=9,
    )
    assert sorted(chunk.request_id for chunk in step(scheduler).chunks) == ["A", "C"]
    scheduler = scheduler_of(
        request("A", 18, 9, caller="a"),
        request("B", 13, 9, caller="b"),
        max_sequences=4,
        max_step_tokens=32,
        max_waiting=9,
    )
    step(scheduler)
    scheduler.add(request("C", 2, 9, caller="c"))
    next(s for s in scheduler._queue if s.request.id == "C").turn.served += LEAD
    assert [chunk.request_id for chunk in step(scheduler).chunks] == ["A"]


def test_no_batch_request_passes_an_interactive_one_that_waits_for_pages() -> None:
    scheduler = scheduler_of(
        request("A", 18, 9, caller="a"),
        request("B", 13, 9, caller="b"),
        request("C", 2, 9, caller="c", priority=Priority.BATCH),
        max_sequences=4,
        max_step_tokens=32,
    )
    assert [chunk.request_id for chunk in step(scheduler).chunks] == ["A"]


def test_a_newcomer_takes_as_many_pages_as_it_needs_and_no_more() -> None:
    """The 3 of A hold 2 pages each of 8. B needs 3 and has the 2 that are free, less one that is
    kept back for each who stays: the youngest 2 of A go."""
    scheduler = scheduler_of(
        *(request(name, 6, 9, caller="a") for name in "PQR"),
        max_sequences=4,
        max_step_tokens=32,
        prefix_reuse=False,
    )
    step(scheduler)
    scheduler.add(request("B", 9, 9, caller="b"))
    assert sorted(chunk.request_id for chunk in step(scheduler).chunks) == ["B", "P"]
    assert (scheduler.preemptions, scheduler.num_waiting) == (2, 2)


def test_a_newcomer_that_cannot_have_enough_takes_nothing() -> None:
    scheduler = scheduler_of(
        *(request(name, 6, 9, caller="a") for name in "PQR"),
        max_sequences=4,
        max_step_tokens=32,
    )
    step(scheduler)
    scheduler.add(request("B", 25, 2, caller="b"))
    assert sorted(chunk.request_id for chunk in step(scheduler).chunks) == ["P", "Q", "R"]
    assert (scheduler.preemptions, scheduler.num_waiting) == (0, 1)


@pytest.mark.parametrize(("pages", "preemptions"), [(5, 0), (6, 1)])
def test_a_page_that_a_newcomer_finds_again_is_not_free_for_its_other_tokens(
    pages: int, preemptions: int
) -> None:
    """P and Q hold 2 pages each. B needs 3 and finds Q's first; if Q gives way, 1 more is free, and
    one is kept back for P: with 5 pages that is 1 too few for the other 2."""
    scheduler = scheduler_of(
        request("P", 6, 9, caller="a"),
        request("Q", [1, 2, 3, 4, 5, 6], 9, caller="a"),
        num_pages=pages,
        max_sequences=2,
        max_step_tokens=32,
    )
    step(scheduler)
    scheduler.add(request("B", [1, 2, 3, 4, 9, 9, 9, 9, 9], 2, caller="b"))
    scheduler.plan()
    assert scheduler.preemptions == preemptions


def test_a_caller_with_a_row_takes_another_from_one_that_is_ahead() -> None:
    """A is ahead of C, B is not; and A has had its slice."""
    scheduler = scheduler_of(
        *(request(name, 2, 99, caller=name.lower()) for name in "ABC"),
        request("D", 2, 9, caller="c"),
        num_pages=99,
        max_context=200,
        max_sequences=3,
        max_step_tokens=32,
        max_waiting=9,
    )
    turns = {}
    for number in range(SLICE + 9):
        step(scheduler)
        if number == 3:
            turns = {s.request.id: s.turn for s in scheduler._rows.running}
            turns["A"].served += LEAD - 9
    assert with_rows(scheduler) == [*"ABC"]
    turns["A"].served += 99
    for _ in range(9):  # turns are compared again after some steps
        step(scheduler)
    assert with_rows(scheduler) == [*"BCD"]
    assert scheduler.preemptions == 1
