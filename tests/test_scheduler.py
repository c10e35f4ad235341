"""Plans worked out by hand; the scheduler is plain Python and these take milliseconds."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import ContextTooLong, Overloaded
from serving.request import Event, FinishReason, Request, SamplingParams
from serving.scheduler import Limits, Plan, Scheduler

EOS = 99


def limits(**changes: int) -> Limits:
    values = dict(
        num_pages=8,
        page_size=4,
        max_sequences=2,
        max_step_tokens=8,
        max_context=32,
        max_waiting=3,
    )
    return Limits(**{**values, **changes})


def request(name: str, prompt: int, max_tokens: int) -> Request:
    return Request(
        id=name,
        prompt_ids=tuple(range(prompt)),
        sampling=SamplingParams(),
        max_tokens=max_tokens,
        eos_ids=frozenset({EOS}),
    )


def shape(plan: Plan) -> list[tuple[str, int, int, bool]]:
    return [(c.request_id, c.start, len(c.token_ids), c.samples) for c in plan.chunks]


def test_the_example_of_the_module() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("A", 3, 2))
    scheduler.add(request("B", 10, 1))
    first = scheduler.plan()
    assert shape(first) == [("A", 0, 3, True), ("B", 0, 5, False)]
    assert [len(c.pages) for c in first.chunks] == [2, 3]
    assert scheduler.commit(first, [50, 51]) == [
        Event(request_id="A", token_id=50, finish_reason=None)
    ]
    second = scheduler.plan()
    assert shape(second) == [("A", 3, 1, True), ("B", 5, 5, True)]
    assert second.chunks[0].token_ids == (50,)
    assert [(e.request_id, e.finish_reason) for e in scheduler.commit(second, [60, 61])] == [
        ("A", FinishReason.LENGTH),
        ("B", FinishReason.LENGTH),
    ]
    assert not scheduler.has_work
    assert scheduler.num_free_pages == 8


def test_eos_ends_and_frees() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("A", 3, 20))
    (event,) = scheduler.commit(scheduler.plan(), [EOS])
    assert event.finish_reason is FinishReason.STOP
    assert scheduler.num_free_pages == 8


def test_a_third_request_waits_for_a_row_and_a_large_one_for_pages() -> None:
    scheduler = Scheduler(limits())
    for name in "ABC":
        scheduler.add(request(name, 2, 2))
    assert [c.request_id for c in scheduler.plan().chunks] == ["A", "B"]
    scheduler.cancel("A")
    assert [c.request_id for c in scheduler.plan().chunks] == ["B", "C"]

    scheduler = Scheduler(limits(num_pages=3))
    scheduler.add(request("A", 2, 4))  # 2 pages
    scheduler.add(request("B", 4, 4))  # 2 pages, only 1 is free
    scheduler.add(request("C", 1, 1))  # would fit, but does not overtake
    assert [c.request_id for c in scheduler.plan().chunks] == ["A"]


def test_a_chunk_of_one_prompt_token_stands_with_the_decodes() -> None:
    """The engine tells decodes by their length, so every single must come before the longer ones.

    Budget 3: A decodes, then B's prompt of 4 gets 2 tokens, then 1 and 1.
    """
    scheduler = Scheduler(limits(max_step_tokens=3))
    scheduler.add(request("A", 1, 9))
    scheduler.add(request("B", 4, 9))
    shapes = []
    for _ in range(3):
        plan = scheduler.plan()
        shapes.append(shape(plan))
        scheduler.commit(plan, [50] * len(plan.chunks))
    assert shapes == [
        [("A", 0, 1, True), ("B", 0, 2, False)],
        [("A", 1, 1, True), ("B", 2, 2, True)],
        [("A", 2, 1, True), ("B", 4, 1, True)],
    ]


def test_what_can_never_fit_and_what_is_too_much() -> None:
    scheduler = Scheduler(limits(num_pages=4))
    with pytest.raises(ContextTooLong, match="17 tokens; this server holds 16"):
        scheduler.add(request("A", 17, 1))
    for name in "ABC":
        scheduler.add(request(name, 2, 2))
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        scheduler.add(request("D", 2, 2))


def test_cancel_between_plan_and_commit() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("A", 2, 5))
    plan = scheduler.plan()
    scheduler.cancel("A")
    assert scheduler.commit(plan, [50]) == []
    assert scheduler.num_free_pages == 8


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_nothing_leaks_and_everything_ends(data: st.DataObject) -> None:
    """Any arrivals, lengths and cancellations: no page twice, none lost, every request answered."""
    scheduler = Scheduler(limits(max_sequences=3, max_waiting=100))
    waiting = data.draw(st.lists(st.tuples(st.integers(1, 31), st.integers(1, 40)), max_size=12))
    left: dict[str, int] = {}
    ended: set[str] = set()
    number = 0
    while waiting or scheduler.has_work:
        if waiting and data.draw(st.booleans()):
            prompt, max_tokens = waiting.pop()
            name, number = str(number), number + 1
            scheduler.add(request(name, prompt, max_tokens))
            left[name] = min(max_tokens, 32 - prompt)
        if left and data.draw(st.integers(0, 9)) == 0:
            name = data.draw(st.sampled_from(sorted(left)))
            scheduler.cancel(name)
            del left[name]
        plan = scheduler.plan()
        assert plan.num_tokens <= 8
        used = [page for chunk in plan.chunks for page in chunk.pages]
        assert len(used) == len(set(used))
        sizes = [len(chunk.token_ids) for chunk in plan.chunks]
        assert sizes == sorted(sizes, key=lambda size: size > 1)
        for chunk in plan.chunks:
            assert chunk.end <= len(chunk.pages) * 4
        for event in scheduler.commit(plan, [50] * len(plan.chunks)):
            left[event.request_id] -= 1
            assert (event.finish_reason is not None) == (left[event.request_id] == 0)
            if event.finish_reason is not None:
                ended.add(event.request_id)
                del left[event.request_id]
    assert not left
    assert scheduler.num_free_pages == 8


@pytest.mark.parametrize("module", ["serving.scheduler", "serving.text", "serving.errors"])
def test_plain_python(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('jax', 'grpc') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
