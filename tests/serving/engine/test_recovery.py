"""Steps that fail, on a device in plain Python: who ends, and that the others get their tokens."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from mixtral_jax.sampling_params import SamplingParams
from serving.engine.engine import Engine
from serving.engine.metrics import Metrics
from serving.engine.recovery import MAX_FAILURES
from serving.engine.worker import EngineWorker
from serving.errors import EngineFailure
from serving.scheduling.request import FinishReason, Request
from serving.scheduling.step_plan import Limits, StepPlan
from tests.support.scripted_device import DeviceFault, Place, Script, ScriptedDevice, undisturbed

LIMITS = Limits(
    num_pages=64, page_size=4, max_sequences=8, max_step_tokens=16, max_context=96, max_waiting=99
)
PLACES: tuple[Place, ...] = ("before", "after", "drawn", "answer")


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "serving.engine")


def request(name: str, prompt: int = 5, max_tokens: int = 12, **changes: Any) -> Request:
    """A prompt of so many tokens, unlike those of other names."""
    seed = sum(map(ord, name))
    values: dict[str, Any] = dict(sampling=SamplingParams(seed=seed), eos_ids=frozenset())
    ids = tuple((seed * 31 + 7 * i) % 89 for i in range(prompt))
    return Request(id=name, prompt_ids=ids, max_tokens=max_tokens, **{**values, **changes})


def fails_with(poisoned: str, place: Place, position: int = 0, choice: int | None = None) -> Script:
    """Steps fail that compute `position` of a request, or a later one."""

    def script(number: int, plans: Sequence[StepPlan]) -> Place | None:
        is_aboard = any(
            chunk.request_id == poisoned and chunk.end > position and choice in (None, chunk.choice)
            for plan in plans
            for chunk in plan.chunks
        )
        return place if is_aboard else None

    return script


def fails_at(numbers: Sequence[int], place: Place) -> Script:
    """Steps with these numbers fail, whoever is in them."""
    return lambda number, plans: place if number in numbers else None


class Run:
    """Requests on an engine with a scripted device; each comes before the turn that it is named
    with."""

    def __init__(
        self, script: Script, arrivals: Sequence[tuple[int, Request]], limits: Limits = LIMITS
    ) -> None:
        self.device = ScriptedDevice(limits, script)
        self.engine = Engine(self.device, limits)
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.failed: list[str] = []
        self.requests = [request for _, request in arrivals]
        waiting = list(arrivals)
        turn = 0
        while waiting or self.engine.has_work:
            while waiting and waiting[0][0] <= turn:
                self.engine.add(waiting.pop(0)[1])
            for event in self.engine.step():
                if event.finish_reason is FinishReason.FAILED:
                    self.failed.append(event.request_id)
                elif event.drawn is not None:
                    answer = self.tokens.setdefault((event.request_id, event.choice), [])
                    answer.append(event.drawn.token_id)
            turn += 1
            assert turn < 2000

    def assert_whole(self, but: Sequence[str] = ()) -> None:
        """Everybody else has the tokens of an undisturbed run, and nothing is held."""
        for request in self.requests:
            if request.id not in but:
                for choice in range(request.n):
                    assert self.tokens[request.id, choice] == undisturbed(request, choice)
        assert self.failed == list(but)
        scheduler = self.engine.scheduler
        assert scheduler.num_free_pages == LIMITS.num_pages and not scheduler.suspects
        assert not self.engine._suspects


@pytest.mark.parametrize("place", PLACES)
def test_the_newest_is_tried_alone_and_ends_alone(place: Place) -> None:
    """A and B run when C comes. [A B C] fails, then [C] alone; so C is in two steps."""
    arrivals = [(0, request("A")), (0, request("B")), (3, request("C"))]
    run = Run(fails_with("C", place), arrivals)
    run.assert_whole(but=["C"])
    assert run.engine.num_failures == 2
    assert run.device.num_resets == (0 if place == "before" else 2)
    aboard = [{chunk.request_id for chunk in plan.chunks} for plan in run.device.plans]
    assert {"A"} not in aboard and {"B"} not in aboard  # nobody suspects them


@pytest.mark.parametrize("place", PLACES)
def test_of_two_that_come_together_the_innocent_goes_on(place: Place) -> None:
    arrivals = [(0, request("A")), (3, request("B")), (3, request("C"))]
    run = Run(fails_with("C", place), arrivals)
    run.assert_whole(but=["C"])
    assert run.engine.num_failures == 2


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("position", [7, 11])
def test_an_old_request_that_turns_bad_is_found_among_all(place: Place, position: int) -> None:
    """It has drawn some tokens; the others go on where they were, token for token."""
    arrivals = [(0, request(name)) for name in "ABCDE"]
    run = Run(fails_with("C", place, position), arrivals)
    run.assert_whole(but=["C"])
    answer = run.tokens["C", 0]
    assert answer == undisturbed(request("C"))[: len(answer)]
    assert len(answer) == position + 1 - 5  # all that come before the bad position


@pytest.mark.parametrize("place", PLACES)
def test_one_bad_choice_ends_its_request(place: Place) -> None:
    arrivals = [(0, request("A")), (0, request("B", n=3)), (1, request("C", n=2))]
    run = Run(fails_with("B", place, 9, choice=2), arrivals)
    run.assert_whole(but=["B"])


@pytest.mark.parametrize("place", PLACES)
def test_a_fault_that_does_not_come_back_ends_nobody(place: Place) -> None:
    arrivals = [(i, request(name, prompt=3 + 5 * i)) for i, name in enumerate("ABCDEFG")]
    for number in range(0, 20, 3):
        run = Run(fails_at([number], place), arrivals)
        run.assert_whole()
        assert run.engine.num_failures == 1


@pytest.mark.parametrize("place", PLACES)
def test_forks_and_prompts_of_many_chunks_survive(place: Place) -> None:
    arrivals = [(0, request("A", 40, 8, n=3)), (2, request("B", 30, 9)), (4, request("C", 2, 20))]
    for number in range(14):
        Run(fails_at([number], place), arrivals).assert_whole()


@pytest.mark.parametrize("place", PLACES)
def test_answers_that_end_while_a_step_fails(place: Place) -> None:
    """A step is planned for them before it is known that they have ended."""
    ends = frozenset(range(0, 97, 7))
    arrivals = [
        (i // 2, request(name, n=1 + i % 3, eos_ids=ends)) for i, name in enumerate("ABCDEF")
    ]
    for number in range(12):
        Run(fails_at([number], place), arrivals).assert_whole()


def test_a_suspect_is_alone_until_it_is_where_it_was() -> None:
    """After step 5 each of the two draws one token alone. Steps overlap: B is alone before it is
    known that A is trusted, and A goes on by itself before it is known of B."""
    run = Run(fails_at([5], "before"), [(0, request("A")), (0, request("B"))])
    run.assert_whole()
    aboard = ["".join(chunk.request_id for chunk in plan.chunks) for plan in run.device.plans]
    assert aboard == ["AB"] * 5 + ["A", "B", "A"] + ["AB"] * 5 + ["B"]


@pytest.mark.parametrize("place", PLACES)
def test_a_prompt_that_is_bad_in_its_third_chunk(place: Place) -> None:
    arrivals = [(0, request("A", max_tokens=40)), (2, request("B", 40))]
    run = Run(fails_with("B", place, 35), arrivals)
    run.assert_whole(but=["B"])
    assert run.engine.num_failures == 2


def test_a_sole_request_is_tried_once_more() -> None:
    Run(fails_at([2], "after"), [(0, request("A"))]).assert_whole()
    run = Run(fails_with("A", "after", 8), [(0, request("A"))])
    run.assert_whole(but=["A"])
    assert run.engine.num_failures == 2


@pytest.mark.parametrize("place", PLACES)
def test_a_device_that_fails_always_ends_the_engine(place: Place) -> None:
    arrivals = [(0, request(f"r{i}")) for i in range(20)]
    with pytest.raises(DeviceFault):
        Run(lambda number, plans: place if number > 4 else None, arrivals)


def test_several_bad_ones_are_all_found() -> None:
    bad = ["B", "D", "F", "G"]

    def script(number: int, plans: Sequence[StepPlan]) -> Place | None:
        aboard = {chunk.request_id for plan in plans for chunk in plan.chunks}
        return "after" if aboard & {*bad} else None

    arrivals = [(0, request("A")), *((2, request(name)) for name in "BCDEFG")]
    run = Run(script, arrivals, replace(LIMITS, max_step_tokens=64))  # all are in one step
    run.failed.sort()
    run.assert_whole(but=bad)
    assert run.engine.num_failures == 1 + len(bad) < MAX_FAILURES


def test_any_number_of_bad_ones_that_come_one_after_another_are_found() -> None:
    def script(number: int, plans: Sequence[StepPlan]) -> Place | None:
        bad = any(chunk.request_id.startswith("x") for plan in plans for chunk in plan.chunks)
        return "after" if bad else None

    bad = [f"x{i}" for i in range(MAX_FAILURES)]
    arrivals = [(0, request("A", max_tokens=90)), *((9 * i, request(x)) for i, x in enumerate(bad))]
    run = Run(script, arrivals)
    run.assert_whole(but=bad)
    assert run.engine.num_failures == 2 * MAX_FAILURES


def test_of_two_steps_that_fail_the_older_is_the_reason() -> None:
    """A and B are in step 3, which fails when it is read; C comes with step 4, which fails too."""
    device = ScriptedDevice(LIMITS, lambda number, plans: {3: "drawn", 4: "after"}.get(number))
    engine = Engine(device, LIMITS)
    for name in "AB":
        engine.add(request(name, max_tokens=20))
    for _ in range(4):
        engine.step()
    engine.add(request("C"))
    engine.step()
    assert engine.scheduler.suspects == {"A", "B"} and engine.num_failures == 1


def test_a_request_from_a_dead_process_is_computed_alone() -> None:
    arrivals = [(0, request("A")), (1, request("B", suspect=True)), (2, request("C"))]
    run = Run(lambda number, plans: None, arrivals)
    run.assert_whole()
    for plan in run.device.plans:
        aboard = {chunk.request_id for chunk in plan.chunks}
        assert aboard == {"B"} or "B" not in aboard
    run = Run(fails_with("B", "drawn"), arrivals)
    run.assert_whole(but=["B"])
    assert run.engine.num_failures == 1  # it was alone already


def test_with_other_hosts_a_fault_ends_the_engine() -> None:
    sent: list[tuple[StepPlan, ...]] = []
    engine = Engine(ScriptedDevice(LIMITS, fails_at([1], "before")), LIMITS, sent.append)
    engine.add(request("A"))
    engine.step()
    with pytest.raises(DeviceFault):
        engine.step()
    assert len(sent) == 2


@pytest.mark.parametrize("place", PLACES)
def test_32_streams_of_4_callers(place: Place) -> None:
    """One of them is bad from its sixth token on, and two steps fail for no reason."""
    requests = [
        request(f"r{i}", 3 + i % 7, 10 + i % 5, n=1 + (i % 8 == 0), caller=f"caller{i % 4}")
        for i in range(32)
    ]
    bad = fails_with("r13", place, len(requests[13].prompt_ids) + 6)

    def script(number: int, plans: Sequence[StepPlan]) -> Place | None:
        return place if number in (7, 29) else bad(number, plans)

    device = ScriptedDevice(LIMITS, script)
    engine = Engine(device, LIMITS)
    worker = EngineWorker(engine, Metrics("toy"))
    worker.start()

    async def answer(asked: Request) -> dict[int, list[int]]:
        tokens: dict[int, list[int]] = {choice: [] for choice in range(asked.n)}
        async with aclosing(worker.submit(asked)) as events:
            async for event in events:
                if event.drawn is not None:
                    tokens[event.choice].append(event.drawn.token_id)
        return tokens

    async def run() -> None:
        outcomes = await asyncio.gather(*map(answer, requests), return_exceptions=True)
        for asked, outcome in zip(requests, outcomes, strict=True):
            if asked.id == "r13":
                assert isinstance(outcome, EngineFailure)
                continue
            assert outcome == {choice: undisturbed(asked, choice) for choice in range(asked.n)}

    asyncio.run(run())
    worker.stop()
    assert not worker.has_failed and engine.num_failures >= 4
    assert not worker._answers and not worker.num_under_way
    assert engine.scheduler.num_free_pages == LIMITS.num_pages
