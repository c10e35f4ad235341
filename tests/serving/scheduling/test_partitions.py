"""Requests are spread over the partitions of a mesh, and stay where they are."""

from mixtral_jax.sampling_params import SamplingParams
from serving.scheduling.partitions import Partitions
from serving.scheduling.request import Drawn, Request
from serving.scheduling.step_plan import Limits

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
