"""Turns of callers, and the room in the queue, worked out by hand."""

import pytest

from serving.errors import Overloaded
from serving.scheduling import queue
from serving.scheduling.pages import PagePool, PageTable
from serving.scheduling.queue import CREDIT, TurnQueue
from serving.scheduling.request import Priority
from serving.scheduling.scheduler import Scheduler
from serving.scheduling.sequence import SequenceState
from tests.serving.scheduling.plain_device import limits, request, scheduler_of, step

POOL = PagePool(8, 4)


def sequence(
    waiting: TurnQueue,
    caller: str,
    arrival: int,
    n: int = 1,
    priority: Priority = Priority.INTERACTIVE,
) -> SequenceState:
    asked = request(f"{caller}{arrival}", 3, 5, n=n, caller=caller, priority=priority)
    return SequenceState(
        request=asked,
        turn=waiting.turn(caller),
        choice=0,
        arrival=arrival,
        seed=0,
        limit=8,
        tokens=[*asked.prompt_ids],
        table=PageTable(POOL),
    )


def order(waiting: TurnQueue) -> list[str]:
    return [head.request.id for head in waiting.heads([])]


def test_the_caller_that_was_served_the_fewest_comes_first() -> None:
    waiting = TurnQueue(99)
    for number, caller in enumerate("aabc"):
        waiting.push(sequence(waiting, caller, number))
    assert order(waiting) == ["a0", "b2", "c3"]  # the older first, where all were served alike
    waiting.turn("a").served, waiting.turn("b").served = 5, 2
    assert order(waiting) == ["c3", "b2", "a0"]
    assert len(waiting) == 4


def test_what_runs_is_reserved() -> None:
    """It has 3 tokens to compute; of its answer at most 5 count, because it has no more."""
    waiting = TurnQueue(99)
    running = sequence(waiting, "a", 0)
    for number, caller in enumerate("ab", 1):
        waiting.push(sequence(waiting, caller, number))
    assert [head.request.id for head in waiting.heads([running])] == ["b2", "a1"]
    assert waiting.turn("a").level == 8


def test_the_example_of_the_module() -> None:
    waiting = TurnQueue(99)
    for number, (caller, served) in enumerate([("A", 5000), ("B", 4500)]):
        waiting.push(sequence(waiting, caller, number))
        waiting.turn(caller).served = served
    waiting.push(sequence(waiting, "C", 2))
    assert waiting.turn("C").served == 4500 - CREDIT
    assert order(waiting) == ["C2", "B1", "A0"]


def test_when_nobody_waits_all_debts_end() -> None:
    """A used an idle server; B comes and is almost level with it, not 9,000 tokens before it."""
    waiting = TurnQueue(99)
    waiting.turn("A").served, waiting.turn("A").rows = 9000, 1
    waiting.push(sequence(waiting, "B", 0))
    assert waiting.turn("B").served == 9000 - CREDIT


def test_a_caller_that_waits_already_is_not_lifted() -> None:
    waiting = TurnQueue(99)
    for number, caller in enumerate("AB"):
        waiting.push(sequence(waiting, caller, number))
    waiting.turn("A").served = 9000
    waiting.turn("B").served = 100
    waiting.push(sequence(waiting, "B", 2))
    assert waiting.turn("B").served == 100


def test_callers_are_forgotten_that_neither_wait_nor_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_MAX_CALLERS", 3)
    waiting = TurnQueue(99)
    waiting.push(sequence(waiting, "waits", 0))
    waiting.turn("runs").rows = 1
    waiting.turn("gone").served = 7000
    kept = waiting.turn("waits"), waiting.turn("runs")
    waiting.turn("new")
    assert len(waiting._turns) == 3
    assert (waiting.turn("waits"), waiting.turn("runs")) == kept
    assert waiting.turn("gone").served == 0


def test_one_row_in_32_is_batchs() -> None:
    waiting = TurnQueue(999)
    for number in range(70):
        waiting.push(sequence(waiting, "a", number))
    for number in range(2):
        waiting.push(sequence(waiting, "b", 100 + number, priority=Priority.BATCH))
    served = []
    for _ in range(72):
        head = waiting.heads([])[0]
        waiting.seat(head)
        served.append(head.is_due)
    assert [i for i, is_due in enumerate(served) if is_due] == [31, 63]
    assert len(waiting) == 0


def test_rows_count_against_batch_only_while_it_waits() -> None:
    waiting = TurnQueue(999)
    for number in range(50):
        waiting.push(sequence(waiting, "a", number))
        waiting.push(sequence(waiting, "b", number))
    for _ in range(40):
        waiting.seat(waiting.heads([])[0])
    batch = sequence(waiting, "c", 99, priority=Priority.BATCH)
    waiting.push(batch)
    for _ in range(31):
        assert waiting.heads([])[0] is not batch
        waiting.seat(waiting.heads([])[0])
    assert waiting.heads([])[0] is batch


def test_the_queue_counts_choices() -> None:
    waiting = TurnQueue(10)
    waiting.push(sequence(waiting, "a", 0, n=7))
    waiting.check_room("a", 3)
    with pytest.raises(Overloaded, match="7 requests are waiting already, .* 10 may"):
        waiting.check_room("a", 4)
    with pytest.raises(Overloaded, match="9 requests"):
        waiting.check_room("a", 2, owed=2)


def test_a_caller_does_not_fill_the_queue_for_others() -> None:
    """Alone A may have 10; B finds room for its half, and so does C for its third."""
    waiting = TurnQueue(10)
    waiting.push(sequence(waiting, "a", 0, n=10))
    waiting.check_room("b", 5)
    with pytest.raises(Overloaded):
        waiting.check_room("a", 1)
    waiting.push(sequence(waiting, "b", 1, n=5))
    with pytest.raises(Overloaded):
        waiting.check_room("b", 1)
    waiting.check_room("c", 3)
    for number in range(20):
        waiting.check_room(f"d{number}", 1)
        waiting.push(sequence(waiting, f"d{number}", number + 2))


def test_more_choices_than_the_whole_queue_find_room_when_nothing_waits() -> None:
    waiting = TurnQueue(4)
    waiting.check_room("a", 16)
    waiting.push(sequence(waiting, "a", 0))
    with pytest.raises(Overloaded):
        waiting.check_room("a", 16)
    with pytest.raises(Overloaded):
        TurnQueue(0).check_room("a", 1)


def test_choices_to_come_of_a_running_request_count() -> None:
    """3 of A's choices wait for its first token, and no more than 3 may wait."""
    scheduler = scheduler_of(request("A", 20, 5, n=3, caller="a"), max_waiting=3)
    step(scheduler)
    assert scheduler.num_waiting == 0 and scheduler.has_room(1, "a")
    assert not scheduler.has_room(2, "a") and scheduler.has_room(2, "b")


def test_it_is_empty_after_all() -> None:
    waiting = TurnQueue(10)
    members = [sequence(waiting, caller, number, n=2) for number, caller in enumerate("aab")]
    for member in members:
        waiting.push(member)
    assert {member.request.id for member in waiting} == {"a0", "a1", "b2"}
    for member in members:
        waiting.remove(member)
    assert not waiting and not list(waiting) and waiting.turn("a").waiting == 0
    assert waiting.sole_head() is None


def test_has_waiting_knows_classes() -> None:
    waiting = TurnQueue(10)
    waiting.push(sequence(waiting, "a", 0, priority=Priority.BATCH))
    assert not waiting.has_waiting(Priority.INTERACTIVE)
    assert waiting.has_waiting(Priority.BATCH)


def test_a_scheduler_takes_no_more_than_has_room() -> None:
    scheduler = Scheduler(limits(max_waiting=4))
    scheduler.add(request("A", 2, 2, n=3, caller="a"))
    assert scheduler.has_room(1, "a") and not scheduler.has_room(2, "a")
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        scheduler.add(request("B", 2, 2, n=2, caller="a"))
    scheduler.add(request("C", 2, 2, n=2, caller="b"))
