"""Requests are spread over the partitions of a mesh, and stay where they are."""

from dataclasses import replace

import pytest

from mixtral_jax.sampling_params import SamplingParams
from serving.errors import Overloaded
from serving.scheduling.partitions import Partitions
from serving.scheduling.request import Drawn, Event, Request
from serving.scheduling.step_plan import Limits, StepPlan
from tests.serving.scheduling.plain_device import with_rows

LIMITS = Limits(
    num_pages=60,
    page_size=4,
    max_sequences=4,
    max_step_tokens=24,
    max_context=96,
    max_waiting=999,
)


def request(name: str) -> Request:
    return Request(
        id=name,
        prompt_ids=(1, 2, 3),
        sampling=SamplingParams(temperature=0.0),
        max_tokens=1,
        eos_ids=frozenset(),
    )


def test_a_request_goes_where_the_fewest_are() -> None:
    partitions = Partitions(LIMITS, 3)
    for name in "ABCDEFG":
        partitions.add(request(name))
    assert partitions.num_waiting == 7
    plans = partitions.plan()
    assert [[chunk.request_id for chunk in plan.chunks] for plan in plans] == [
        ["A", "D", "G"],
        ["B", "E"],
        ["C", "F"],
    ]
    assert (partitions.num_running, partitions.num_waiting) == (7, 0)
    assert partitions.num_pages == 180
    assert partitions.num_free_pages == 180 - 7


def test_each_partition_records_its_own_plan() -> None:
    partitions = Partitions(LIMITS, 3)
    for name in "AB":
        partitions.add(request(name))
    plans = partitions.plan()
    assert [len(plan.chunks) for plan in plans] == [1, 1, 0]
    events = partitions.commit(plans, [[Drawn(token_id=7)], [Drawn(token_id=8)], []])
    assert [(event.request_id, event.drawn.token_id) for event in events if event.drawn] == [
        ("A", 7),
        ("B", 8),
    ]
    assert not partitions.has_work and partitions.num_free_pages == 180


def test_a_cancelled_request_is_found_in_any_partition() -> None:
    partitions = Partitions(LIMITS, 3)
    for name in "ABC":
        partitions.add(request(name))
    partitions.cancel("C")
    assert [len(plan.chunks) for plan in partitions.plan()] == [1, 1, 0]


def of(plans: tuple[StepPlan, ...]) -> list[list[str]]:
    return [[chunk.request_id for chunk in plan.chunks] for plan in plans]


def record(partitions: Partitions, plans: tuple[StepPlan, ...]) -> list[Event]:
    return partitions.commit(plans, [[Drawn(token_id=7)] * len(plan.chunks) for plan in plans])


def with_suspects(*names: str, count: int = 2) -> Partitions:
    partitions = Partitions(LIMITS, count)
    for name in "ABCD":
        partitions.add(replace(request(name), max_tokens=50, suspect=name in names))
    return partitions


def test_nothing_is_computed_beside_a_suspect() -> None:
    """In no partition; the suspects and all others take turns."""
    partitions = with_suspects("B", "C")
    assert partitions.suspects == {"B", "C"}
    steps = []
    for _ in range(6):
        plans = partitions.plan()
        steps.append(of(plans))
        record(partitions, plans)
    assert steps[:3] == [[["A"], ["D"]], [[], ["B"]], [["C"], []]]
    assert steps[3:] == steps[:3]
    names = [name for scheduler in partitions._schedulers for name in with_rows(scheduler)]
    assert sorted(names) == [*"ABCD"]


def test_a_suspect_that_has_ended_takes_no_turn() -> None:
    partitions = with_suspects("B")
    partitions.plan()
    partitions.cancel("B")
    assert partitions.suspects == frozenset()
    assert of(partitions.plan()) == [["A", "C"], ["D"]]


def test_suspects_are_named_and_trusted_again() -> None:
    partitions = with_suspects(count=1)
    record(partitions, partitions.plan())
    partitions.suspect(["A", "C"])
    partitions.suspect(["A"])
    seen = []
    for _ in range(3):
        plans = partitions.plan()
        seen.append(of(plans))
        record(partitions, plans)
    assert seen == [[["B", "D"]], [["A"]], [["C"]]]
    partitions.trust(["A", "C", "never heard of"])
    assert of(partitions.plan()) == [[*"ABCD"]]


def test_a_suspect_without_a_row_gives_its_turn_to_the_others() -> None:
    """The 4 rows are A to D's; E waits, and the step is not lost."""
    partitions = Partitions(LIMITS)
    for name in "ABCDE":
        partitions.add(replace(request(name), max_tokens=50, suspect=name == "E"))
    for _ in range(3):
        plans = partitions.plan()
        assert of(plans) == [[*"ABCD"]]
        record(partitions, plans)


def test_what_sits_a_step_out_sits_it_out_in_its_own_turn_too() -> None:
    partitions = with_suspects("B", count=1)
    assert of(partitions.plan({"A"})) == [["C", "D"]]
    plans = partitions.plan({"B"})
    assert [sorted(names) for names in of(plans)] == [["A", "C", "D"]]


def test_withdrawn_plans_of_all_partitions() -> None:
    partitions = Partitions(LIMITS, 3)
    for name in "AB":
        partitions.add(request(name))
    plans = partitions.plan()
    partitions.withdraw(plans)
    again = partitions.plan()
    assert again == plans
    record(partitions, again)
    assert not partitions.has_work


def test_all_partitions_lose_their_pages() -> None:
    partitions = with_suspects()
    partitions.plan()
    partitions.requeue_all()
    assert (partitions.num_running, partitions.num_waiting) == (0, 4)
    assert of(partitions.plan()) == [["A", "C"], ["B", "D"]]


def test_a_request_goes_where_its_caller_has_room() -> None:
    """Partition 0 has fewer sequences, but all choices of A that it may have."""
    partitions = Partitions(replace(LIMITS, max_waiting=3), 2)
    partitions.add(replace(request("A"), n=3, caller="a"))
    for name in "BCD":
        partitions.add(replace(request(name), caller="b"))
    assert [s.num_waiting for s in partitions._schedulers] == [2, 2]
    partitions.cancel("B" if partitions._schedulers[0].has("B") else "C")
    assert [s.has_room(1, "a") for s in partitions._schedulers] == [False, True]
    assert partitions.has_room(1, "a")
    partitions.add(replace(request("E"), caller="a"))
    assert partitions._schedulers[1].has("E")
    assert not partitions.has_room(3, "a")
    with pytest.raises(Overloaded):
        partitions.add(replace(request("F"), n=3, caller="a"))
