"""Plans worked out by hand.

Page size 4 and, where a test says nothing else, 8 pages, 2 rows and 8 tokens a step.
"""

import subprocess
import sys
from dataclasses import replace

import pytest

from mixtral_jax.sampling_params import SamplingParams
from serving.errors import ContextTooLong, InvalidRequest, Overloaded
from serving.scheduling.request import FinishReason
from serving.scheduling.rows import Rows
from serving.scheduling.step_plan import Chunk, StepPlan
from tests.serving.scheduling.plain_device import (
    EOS,
    Device,
    commit,
    drive,
    request,
    scheduler_of,
    shape,
    step,
    told,
)


def test_the_example_of_the_module() -> None:
    scheduler = scheduler_of(request("A", 3, 2), request("B", 10, 1))
    first = scheduler.plan()
    assert shape(first) == [("A", 0, 3, True), ("B", 0, 5, False)]
    assert [chunk.pages for chunk in first.chunks] == [(0,), (1, 2)]
    second = scheduler.plan()
    assert shape(second) == [("A", 3, 1, True), ("B", 5, 5, True)]
    assert [chunk.pages for chunk in second.chunks] == [(0,), (1, 2, 3)]
    assert [(c.token_ids[0], c.follows) for c in second.chunks] == [(0, 0), (66005, None)]
    assert told(commit(scheduler, first)) == [("A", 0, 50, None), ("B", 0, None, None)]
    assert scheduler.plan() == StepPlan(chunks=())  # both are at their last token
    assert told(commit(scheduler, second, [60, 61])) == [
        ("A", 0, 60, FinishReason.LENGTH),
        ("B", 0, 61, FinishReason.LENGTH),
    ]
    assert not scheduler.has_work
    assert scheduler.num_free_pages == 8


def test_eos_ends_and_frees() -> None:
    scheduler = scheduler_of(request("A", 3, 20))
    assert told(commit(scheduler, scheduler.plan(), EOS)) == [("A", 0, EOS, FinishReason.STOP)]
    assert scheduler.num_free_pages == 8


def test_a_third_request_waits_for_a_row_and_has_it_in_the_next_plan() -> None:
    scheduler = scheduler_of(*(request(name, 2, 2) for name in "ABC"))
    assert shape(scheduler.plan()) == [("A", 0, 2, True), ("B", 0, 2, True)]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    scheduler.cancel("A")
    assert shape(scheduler.plan()) == [("B", 2, 1, True), ("C", 0, 2, True)]


def test_nobody_overtakes_one_that_waits_for_pages() -> None:
    """B needs 2 pages of the 3 that A leaves, and one is A's to grow; C would need only 1."""
    scheduler = scheduler_of(
        request("A", 5, 9), request("B", 9, 9), request("C", 1, 1), num_pages=5, max_sequences=3
    )
    assert [c.request_id for c in step(scheduler).chunks] == ["A"]
    scheduler = scheduler_of(
        request("A", 5, 9), request("B", 8, 9), request("C", 1, 1), num_pages=5, max_sequences=3
    )
    assert [c.request_id for c in step(scheduler).chunks] == ["A", "B"]


def test_a_chunk_of_one_prompt_token_stands_with_the_decodes() -> None:
    """The engine tells decodes by their length, so every single must come before the longer ones.

    Budget 3: A decodes, then B's prompt of 4 gets 2 tokens, then 1 and 1.
    """
    scheduler = scheduler_of(request("A", 1, 9), request("B", 4, 9), max_step_tokens=3)
    assert [shape(step(scheduler)) for _ in range(3)] == [
        [("A", 0, 1, True), ("B", 0, 2, False)],
        [("A", 1, 1, True), ("B", 2, 2, True)],
        [("A", 2, 1, True), ("B", 4, 1, True)],
    ]


def test_half_to_the_oldest_prompt_and_the_rest_to_the_shortest() -> None:
    """A decodes, B is long and older than C and D. Of 9 tokens A takes 1 and B 4 of the other 8."""
    scheduler = scheduler_of(
        request("A", 1, 9), num_pages=20, max_sequences=4, max_step_tokens=9, max_waiting=9
    )
    step(scheduler)
    for name, prompt in ("B", 20), ("C", 7), ("D", 3):
        scheduler.add(request(name, prompt, 9))
    assert [shape(step(scheduler)) for _ in range(3)] == [
        [("A", 1, 1, True), ("C", 0, 1, False), ("B", 0, 4, False), ("D", 0, 3, True)],
        [("A", 2, 1, True), ("D", 3, 1, True), ("B", 4, 4, False), ("C", 1, 3, False)],
        [("A", 3, 1, True), ("D", 4, 1, True), ("B", 8, 4, False), ("C", 4, 3, True)],
    ]
    # Nobody else has a prompt: B takes what is left.
    assert shape(step(scheduler))[-1] == ("B", 12, 6, False)


def test_what_can_never_fit_and_what_is_too_much() -> None:
    scheduler = scheduler_of(num_pages=4)
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        scheduler.add(request("A", 0, 1))
    assert not scheduler.has_work
    with pytest.raises(ContextTooLong, match="length is 16 tokens.* has 17"):
        scheduler.add(request("A", 17, 1))
    for name in "ABC":
        scheduler.add(request(name, 2, 2))
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        scheduler.add(request("D", 2, 2))


def test_cancel_frees_in_the_same_step() -> None:
    scheduler = scheduler_of(request("A", 2, 5))
    plan = scheduler.plan()
    scheduler.cancel("A")
    assert scheduler.num_free_pages == 8
    assert commit(scheduler, plan) == []
    scheduler.cancel("A")  # it has ended
    assert not scheduler.has_work


def test_one_choice_ends_and_the_others_go_on() -> None:
    scheduler = scheduler_of(request("A", 2, 9, n=3), max_sequences=3)
    step(scheduler)
    step(scheduler)  # the forks draw their first tokens, in pages of their own
    assert (scheduler.num_running, scheduler.num_free_pages) == (3, 5)
    scheduler.cancel("A", 0)
    assert (scheduler.num_running, scheduler.num_free_pages) == (2, 6)
    assert [chunk.choice for chunk in step(scheduler).chunks] == [1, 2]
    scheduler.cancel("A", 2)
    assert [chunk.choice for chunk in step(scheduler).chunks] == [1]
    scheduler.cancel("A")
    assert not scheduler.has_work and scheduler.num_free_pages == 8


def test_past_the_deadline_nothing_more_is_computed() -> None:
    a = request("A", 2, 5, deadline=10.0)
    b = replace(a, id="B", n=2)
    scheduler = scheduler_of(a, b, request("C", 2, 5), max_sequences=1, max_waiting=4)
    plan = scheduler.plan()
    assert scheduler.expire(now=10.0) == []
    late = FinishReason.DEADLINE
    assert told(scheduler.expire(now=10.1)) == [
        ("A", 0, None, late),
        ("B", 0, None, late),  # was waiting, and stood for both its choices
        ("B", 1, None, late),
    ]
    assert scheduler.num_free_pages == 8
    assert commit(scheduler, plan) == []
    assert [c.request_id for c in step(scheduler).chunks] == ["C"]


def test_a_known_prefix_is_not_computed_again() -> None:
    """A's prompt of 9 tokens fills 2 pages. B has the first 6 of them: 1 page. C has all 9."""
    tokens = list(range(9))
    scheduler = scheduler_of(request("A", tokens, 1), max_step_tokens=9)
    step(scheduler)
    assert (scheduler.num_free_pages, scheduler.num_cached_pages) == (8, 2)
    scheduler.add(request("B", tokens[:6], 9))
    scheduler.add(request("C", tokens, 9))
    plan = scheduler.plan()
    assert shape(plan) == [("C", 8, 1, True), ("B", 4, 2, True)]
    c, b = plan.chunks
    assert (c.pages[:2], b.pages[0]) == ((0, 1), 0)
    assert (scheduler.prompt_tokens, scheduler.prefix_hit_tokens) == (9 + 6 + 9, 4 + 8)


def test_of_a_page_that_is_known_at_least_one_token_is_computed() -> None:
    scheduler = scheduler_of(request("A", range(8), 1))
    step(scheduler)
    scheduler.add(request("B", range(8), 1))
    assert shape(scheduler.plan()) == [("B", 4, 4, True)]


def test_prefix_reuse_can_be_turned_off() -> None:
    scheduler = scheduler_of(request("A", range(8), 1), prefix_reuse=False)
    step(scheduler)
    scheduler.add(request("B", range(8), 1))
    assert shape(scheduler.plan()) == [("B", 0, 8, True)]


def test_the_youngest_gives_way_and_goes_on_later() -> None:
    """4 pages: A has 6 tokens (2 pages) and B 3 (1). In step 3 B takes the last page for its fifth
    token, and in step 4 A needs one for its ninth. B goes back, and has 6 tokens by now; when A has
    ended it finds its first page again and computes only what stood in the other one.
    """
    scheduler = scheduler_of(
        request("A", 6, 6), request("B", 3, 9), num_pages=4, max_step_tokens=16
    )
    for expected in (
        [("A", 0, 6, True), ("B", 0, 3, True)],
        [("A", 6, 1, True), ("B", 3, 1, True)],
        [("A", 7, 1, True), ("B", 4, 1, True)],
        [("A", 8, 1, True)],
    ):
        assert shape(step(scheduler, range(50, 50 + len(expected)))) == expected
    assert (scheduler.preemptions, scheduler.num_waiting, scheduler.num_free_pages) == (1, 1, 1)
    step(scheduler), step(scheduler)
    plan = scheduler.plan()
    assert shape(plan) == [("B", 4, 2, True)]
    assert plan.chunks[0].token_ids == (51, 51)
    assert plan.chunks[0].prompt_length == 3


def test_while_a_plan_is_open_nobody_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(
        request("A", 7, 9), request("B", 7, 9), num_pages=4, max_step_tokens=16, max_sequences=2
    )
    monkeypatch.setattr(Rows, "_num_spare", 99)  # both at once
    step(scheduler)
    second = scheduler.plan()
    assert shape(second) == [("A", 7, 1, True), ("B", 7, 1, True)]
    assert scheduler.plan() == StepPlan(chunks=())
    commit(scheduler, second)
    assert shape(scheduler.plan()) == [("A", 8, 1, True)]
    assert scheduler.preemptions == 1


def test_pages_that_have_left_the_window_are_free() -> None:
    """Window 4: when B has 8 tokens, the next one (position 8) sees 5 .. 8, and not the page of
    0 .. 3."""
    scheduler = scheduler_of(
        request("A", 1, 1), request("B", 8, 5), window=4, max_step_tokens=9, prefix_reuse=False
    )
    assert step(scheduler).chunks[1].pages == (1, 2)
    assert scheduler.num_free_pages == 7
    (chunk,) = scheduler.plan().chunks
    assert chunk.pages[:2] == (0, 2)
    assert len(chunk.pages) == 3


@pytest.mark.parametrize("pipelined", [False, True])
def test_with_a_window_the_pool_need_not_hold_the_context(pipelined: bool) -> None:
    """Window 8, a pool of 16 tokens, a context of 80. The prompt's first chunk takes all pages;
    then positions 0 .. 7 have left, as the query at 16 sees 9 .. 16.
    """
    a = request("A", 70, 99)
    scheduler = scheduler_of(a, window=8, num_pages=4, max_context=80, max_step_tokens=32)
    device = Device(scheduler.limits, [a])
    events = drive(scheduler, device, lambda: pipelined)
    assert shape(device.plans[0]) == [("A", 0, 16, False)]
    assert shape(device.plans[1]) == [("A", 16, 8, False)]
    assert [event.computed for event in events[:7]] == [16, 24, 32, 40, 48, 56, 64]
    assert len(events[7:]) == 10
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert scheduler.num_free_pages == 4


def test_a_window_wider_than_the_pool_cuts_the_answer_as_without_one() -> None:
    with pytest.raises(ContextTooLong, match="length is 16 tokens"):
        scheduler_of(request("A", 16, 1), window=16, num_pages=4)


def test_a_token_that_is_not_known_yet_can_be_planned() -> None:
    scheduler = scheduler_of(request("A", 2, 9), request("B", 2, 3))
    first, second = scheduler.plan(), scheduler.plan()
    assert [(c.token_ids, c.start, c.follows) for c in second.chunks] == [
        ((0,), 2, 0),
        ((0,), 2, 1),
    ]
    commit(scheduler, first, [50, 51])
    third = scheduler.plan()
    assert [(c.start, c.follows) for c in third.chunks] == [(3, 0), (3, 1)]
    assert told(commit(scheduler, second, [EOS, 61])) == [
        ("A", 0, EOS, FinishReason.STOP),
        ("B", 0, 61, None),
    ]
    assert scheduler.num_free_pages == 7
    # A's chunk of the third plan is passed over; B's was its last, and nothing is planned behind.
    assert scheduler.plan() == StepPlan(chunks=())
    assert told(commit(scheduler, third, [70, 71])) == [("B", 0, 71, FinishReason.LENGTH)]
    assert not scheduler.has_work


def test_what_sampling_needs() -> None:
    sampling = SamplingParams(frequency_penalty=0.5, seed=2**31 - 1)
    a = request("A", [1, 2, 3], 9, sampling=sampling, min_tokens=2, n=2)
    scheduler = scheduler_of(a, request("B", 7, 9), max_step_tokens=5)

    def seen(chunk: Chunk) -> tuple[int, tuple[int, ...], frozenset[int], int]:
        return chunk.choice, chunk.history, chunk.forbidden, chunk.seed

    none = frozenset[int]()
    first = scheduler.plan()
    assert [seen(c) for c in first.chunks] == [
        (0, (1, 2), a.eos_ids, 2**31 - 1),
        (0, (), none, 0),  # B: part of a prompt, nothing drawn
    ]
    second = scheduler.plan()  # A's fourth token is the device's; all before it are known
    assert seen(second.chunks[0]) == (0, (1, 2, 3), a.eos_ids, 2**31 - 1)
    commit(scheduler, first)
    commit(scheduler, second)
    assert seen(scheduler.plan().chunks[0]) == (0, (1, 2, 3, 50), none, 2**31 - 1)


def test_seeds_of_choices_stay_in_31_bits() -> None:
    sampling = SamplingParams(seed=2**31 - 1)
    scheduler = scheduler_of(request("A", 2, 9, sampling=sampling, n=2))
    step(scheduler)
    assert [chunk.seed for chunk in scheduler.plan().chunks] == [2**31 - 1, 0]


def test_without_a_seed_each_request_draws_with_another() -> None:
    sampling = SamplingParams()
    scheduler = scheduler_of(
        *(request(name, 2, 9, sampling=sampling, n=2) for name in "ABC"),
        max_sequences=6,
        num_pages=99,
        max_waiting=6,
    )
    step(scheduler)
    seeds = [(chunk.choice, chunk.seed) for chunk in scheduler.plan().chunks]
    firsts = [seed for choice, seed in seeds if choice == 0]
    assert len(set(firsts)) == 3 and all(0 <= seed < 2**31 for seed in firsts)
    seconds = [seed for choice, seed in seeds if choice == 1]
    assert sorted(seconds) == sorted((seed + 1) % 2**31 for seed in firsts)


@pytest.mark.parametrize("prefix_reuse", [True, False])
@pytest.mark.parametrize(
    ("prompt", "pages", "copies"),
    [
        (6, [(0, 1), (0, 2)], ((1, 2),)),  # half a page is copied
        (8, [(0, 1, 3), (0, 2)], ((1, 2),)),  # the last page is full, but is written again
        (5, [(0, 1), (0, 2)], ()),  # of the last page only what is written again
    ],
)
def test_choices_are_forked_from_the_first(
    prompt: int,
    pages: list[tuple[int, ...]],
    copies: tuple[tuple[int, int], ...],
    prefix_reuse: bool,
) -> None:
    scheduler = scheduler_of(request("A", prompt, 2, n=2), prefix_reuse=prefix_reuse)
    assert told(commit(scheduler, scheduler.plan())) == [("A", 0, 50, None)]
    plan = scheduler.plan()
    assert [(c.choice, c.start, c.samples) for c in plan.chunks] == [
        (0, prompt, True),
        (1, prompt - 1, True),
    ]
    assert [chunk.pages for chunk in plan.chunks] == pages
    assert plan.copies == copies
    assert told(commit(scheduler, plan, [51, 52])) == [
        ("A", 0, 51, FinishReason.LENGTH),
        ("A", 1, 52, None),
    ]
    assert step(scheduler).copies == ()
    assert scheduler.num_free_pages == 8


def test_forks_of_a_choice_that_ends_at_once() -> None:
    """Its page is the source of both copies, and must not be had by the waiting B meanwhile."""
    scheduler = scheduler_of(request("A", 3, 1, n=3), max_sequences=3)
    step(scheduler)
    scheduler.add(request("B", 9, 1))
    plan = scheduler.plan()
    assert [(c.request_id, c.choice) for c in plan.chunks] == [("A", 1), ("A", 2), ("B", 0)]
    assert [source for source, _ in plan.copies] == [0, 0]
    assert 0 not in plan.chunks[2].pages


def test_forks_without_a_row_wait_behind_those_that_wait() -> None:
    """They are sequences like any other then, and find the prompt's full pages."""
    scheduler = scheduler_of(
        request("A", 6, 2, n=3), request("B", 1, 1), max_sequences=1, max_waiting=4
    )
    step(scheduler), step(scheduler)
    assert scheduler.num_waiting == 3
    assert [shape(step(scheduler)) for _ in range(5)] == [
        [("B", 0, 1, True)],
        [("A", 4, 2, True)],
        [("A", 6, 1, True)],
        [("A", 4, 2, True)],
        [("A", 6, 1, True)],
    ]
    assert (scheduler.prompt_tokens, scheduler.prefix_hit_tokens) == (7, 0)


def test_cancel_takes_all_choices_wherever_they_are() -> None:
    scheduler = scheduler_of(request("A", 6, 9, n=3))
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    scheduler.cancel("A")
    assert not scheduler.has_work
    assert scheduler.num_free_pages == 8


@pytest.mark.parametrize(
    "module",
    [
        "serving.scheduling.scheduler",
        "serving.scheduling.pages",
        "serving.service.answer.stop_texts",
        "serving.errors",
    ],
)
def test_plain_python(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('jax', 'grpc') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_events_tell_when_a_request_was_seated_and_in_how_many_steps() -> None:
    """The worked example of the module: A draws in its first step, B in its second."""
    scheduler = scheduler_of(request("A", 3, 2), request("B", 10, 1))
    told = []
    for now in (5.0, 6.0):
        scheduler.expire(now)
        told += commit(scheduler, scheduler.plan())
    assert [(event.request_id, event.seated, event.steps) for event in told] == [
        ("A", 5.0, 1),
        ("B", 5.0, 1),  # a part of its prompt
        ("A", 5.0, 2),
        ("B", 5.0, 2),
    ]


def test_a_fork_is_seated_with_its_request_and_counts_its_own_steps() -> None:
    scheduler = scheduler_of(request("A", 10, 2, n=2))
    told = []
    for now in (5.0, 6.0, 7.0, 8.0):
        scheduler.expire(now)
        told += commit(scheduler, scheduler.plan())
    assert [(event.choice, event.seated, event.steps) for event in told] == [
        (0, 5.0, 1),  # 8 tokens of the prompt
        (0, 5.0, 2),  # the other 2
        (0, 5.0, 3),
        (1, 5.0, 1),
        (1, 5.0, 2),
    ]
