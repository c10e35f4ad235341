"""The loop on a device in plain Python: overlap, late masks, forced tokens, rejected guesses."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from mixtral_jax.sampling_params import SamplingParams
from serving.engine.device import Masks
from serving.engine.engine import Engine
from serving.scheduling.request import Event, FinishReason, Request
from serving.scheduling.step_plan import Limits, StepPlan
from tests.support.scripted_device import (
    Place,
    ScriptedDevice,
    bits_of,
    next_token,
    undisturbed,
)

LIMITS = Limits(
    num_pages=64, page_size=4, max_sequences=8, max_step_tokens=16, max_context=96, max_waiting=99
)
EVEN = frozenset(range(0, 97, 2))


def request(name: str, prompt: int = 5, max_tokens: int = 12, **changes: Any) -> Request:
    seed = sum(map(ord, name))
    values: dict[str, Any] = dict(sampling=SamplingParams(seed=seed), eos_ids=frozenset())
    ids = tuple((seed * 31 + 7 * i) % 89 for i in range(prompt))
    return Request(id=name, prompt_ids=ids, max_tokens=max_tokens, **{**values, **changes})


def drawn(events: Sequence[Event]) -> list[tuple[str, int]]:
    return [(event.request_id, event.drawn.token_id) for event in events if event.drawn]


def finished(engine: Engine) -> dict[tuple[str, int], list[int]]:
    """Steps to the end; tokens by request and choice."""
    answers: dict[tuple[str, int], list[int]] = {}
    for _ in range(1000):
        for event in engine.step():
            assert event.finish_reason is not FinishReason.FAILED
            if event.drawn is not None:
                answer = answers.setdefault((event.request_id, event.choice), [])
                answer.append(event.drawn.token_id)
        if not engine.has_work:
            return answers
    raise AssertionError("it does not end")


def test_the_next_step_is_launched_before_the_last_one_is_read() -> None:
    device = ScriptedDevice(LIMITS)
    engine = Engine(device, LIMITS)
    asked = request("A", max_tokens=3)
    engine.add(asked)
    tokens = undisturbed(asked)
    assert drawn(engine.step()) == [] and device.num_steps == 1
    assert drawn(engine.step()) == [("A", tokens[0])] and device.num_steps == 2
    assert drawn(engine.step()) == [("A", tokens[1])] and device.num_steps == 3
    assert drawn(engine.step()) == [("A", tokens[2])] and device.num_steps == 3
    assert not engine.has_work and engine.step() == []


def test_a_device_that_answers_late_is_waited_for_with_the_next_step_launched() -> None:
    device = ScriptedDevice(LIMITS)
    engine = Engine(device, LIMITS)
    asked = request("A")
    engine.add(asked)
    engine.step()
    device.can_answer.clear()
    events: list[Event] = []
    turn = threading.Thread(target=lambda: events.extend(engine.step()))
    turn.start()
    deadline = time.monotonic() + 10
    while device.num_steps < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert device.num_steps == 2 and turn.is_alive()
    device.can_answer.set()
    turn.join(10)
    assert drawn(events) == [("A", undisturbed(asked)[0])]


class EvenTokens:
    """Lets requests whose names begin with "m" draw even tokens only.

    Their masks follow from all tokens before: it notices if it is asked before it knows them.

    Args:
        late: numbers of the masks that come late, counted over all rows.
        forced: (request, place in its answer) to a token that it must have there.
    """

    def __init__(
        self, late: Sequence[int] = (), forced: dict[tuple[str, int], int] | None = None
    ) -> None:
        self.known: dict[tuple[str, int], int] = {}  # tokens of each answer
        self.late_ones = late
        self.forced = forced or {}
        self.num_masks = 0

    def add(self, request: Request) -> Request:
        return request

    def forget(self, request_id: str, choice: int | None = None) -> None:
        pass

    def has_rows(self, plans: Sequence[StepPlan]) -> bool:
        return any(c.request_id.startswith("m") for plan in plans for c in plan.chunks)

    def advance(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.drawn is not None:
                key = event.request_id, event.choice
                self.known[key] = self.known.get(key, 0) + 1

    def masks(self, plans: Sequence[StepPlan]) -> Masks:
        (plan,) = plans
        allowed = np.full((len(plan.chunks), 4), -1, np.int32)
        late: set[tuple[int, int]] = set()
        forced: dict[tuple[int, int], tuple[int, ...]] = {}
        for i, chunk in enumerate(plan.chunks):
            if not chunk.request_id.startswith("m") or not chunk.samples:
                continue
            place = self.known.get((chunk.request_id, chunk.choice), 0)
            if place < chunk.end - chunk.prompt_length:
                late.add((0, i))  # it follows a token that was never drawn
                continue
            if self.num_masks in self.late_ones:
                late.add((0, i))
            elif run := self._forced(chunk.request_id, place):
                forced[0, i] = run
            else:
                allowed[i] = bits_of(EVEN)
            self.num_masks += 1
        return Masks((allowed,), frozenset(late), forced)

    def _forced(self, request_id: str, place: int) -> tuple[int, ...]:
        """The tokens from a place on, up to the first that is not forced."""
        run: list[int] = []
        while (request_id, place + len(run)) in self.forced:
            run.append(self.forced[request_id, place + len(run)])
        return tuple(run)


def masked(asked: Request, choice: int = 0, forced: dict[int, int] | None = None) -> list[int]:
    """What a masked request draws, worked out token by token."""
    assert asked.sampling.seed is not None
    tokens = list(asked.prompt_ids)
    for place in range(asked.max_tokens):
        token = next_token(tokens, asked.sampling.seed + choice, EVEN)
        tokens.append((forced or {}).get(place, token))
    return tokens[len(asked.prompt_ids) :]


@pytest.mark.parametrize("late", [(), (0,), (1, 2, 3), (4, 9), range(0, 40, 3)])
def test_rows_whose_mask_is_late_sit_out_and_draw_the_same_later(late: Sequence[int]) -> None:
    """Beside rows without a mask, which lose no step."""
    device = ScriptedDevice(LIMITS)
    engine = Engine(device, LIMITS, masks=EvenTokens(late))
    asked = [request("m1"), request("A"), request("m2", 7, n=2), request("B", 20)]
    for one in asked:
        engine.add(one)
    answers = finished(engine)
    for one in asked:
        for choice in range(one.n):
            wanted = masked(one, choice) if one.id.startswith("m") else undisturbed(one, choice)
            assert answers[one.id, choice] == wanted
    assert engine.scheduler.num_free_pages == LIMITS.num_pages
    assert engine.num_failures == 0


def test_masks_where_pages_run_out_and_steps_are_empty() -> None:
    """6 pages of 4 tokens, and two answers that end with 4 each."""
    small = replace(LIMITS, num_pages=6)
    engine = Engine(ScriptedDevice(small), small, masks=EvenTokens((5, 6)))
    asked = [request("m1"), request("m2"), request("m3", 11)]
    for one in asked:
        engine.add(one)
    answers = finished(engine)
    assert answers == {(one.id, 0): masked(one) for one in asked}
    assert engine.scheduler.preemptions > 0


def test_masks_cost_no_step_where_they_come_in_time() -> None:
    steps = []
    for name in ("A", "m"):
        device = ScriptedDevice(LIMITS)
        engine = Engine(device, LIMITS, masks=EvenTokens())
        engine.add(request(name))
        finished(engine)
        steps.append(device.num_steps)
        assert [masks is None for masks in device.masks] == [name == "A"] * len(device.masks)
    assert steps == [12, 12]


def test_a_token_that_is_forced_is_taken_whatever_the_row_draws() -> None:
    forced = {0: 11, 4: 13, 5: 15}
    engine = Engine(
        ScriptedDevice(LIMITS),
        LIMITS,
        masks=EvenTokens(forced={("m", place): token for place, token in forced.items()}),
    )
    asked, other = request("m"), request("A")
    engine.add(asked)
    engine.add(other)
    answers = finished(engine)
    assert answers["m", 0] == masked(asked, forced=forced)
    assert answers["A", 0] == undisturbed(other)


class Guesser:
    """Guesses the tokens of an undisturbed answer, and every `wrong`-th of them wrong.

    It has nothing to say of requests whose names begin with "s".
    """

    chance = 1.0

    def __init__(self, wrong: int, request: Request) -> None:
        self.wrong, self.request = wrong, request
        self.count = 0

    def guess(self, tokens: Sequence[int], count: int) -> Sequence[int]:
        if self.request.id.startswith("s"):
            return []
        guesses: list[int] = []
        assert self.request.sampling.seed is not None
        for _ in range(min(count, 3)):
            self.count += 1
            token = next_token([*tokens, *guesses], self.request.sampling.seed)
            guesses.append((token + (self.count % self.wrong == 0)) % 97)
        return guesses


@pytest.mark.parametrize("wrong", [1, 2, 3, 5, 9999])
def test_guesses_change_no_answer_whether_right_or_rejected(wrong: int) -> None:
    device = ScriptedDevice(LIMITS)
    engine = Engine(device, LIMITS, proposer=partial(Guesser, wrong))
    asked = [
        request("A", max_tokens=20),
        request("B", 21, 13, n=2),
        request("s", 9),
        request("C", 3, 30, eos_ids=frozenset(range(0, 97, 9))),
        request("D", 4, 15, min_tokens=6),
        request("E", 4, 9, sampling=SamplingParams(seed=5, frequency_penalty=1.0)),
    ]
    for one in asked:
        engine.add(one)
    answers = finished(engine)
    for one in asked:
        for choice in range(one.n):
            assert answers[one.id, choice] == undisturbed(one, choice), one.id
    assert engine.scheduler.num_free_pages == LIMITS.num_pages
    assert 0 < device.num_guesses >= device.num_right
    assert (device.num_right == 0) == (wrong == 1)


def test_guesses_take_nothing_from_a_prompt() -> None:
    """Of 16 tokens a step four answers take one each; a prompt of 60 has its first token after the
    same number of steps with guesses and without."""
    steps = []
    for proposer in (None, partial(Guesser, 9999)):
        device = ScriptedDevice(LIMITS)
        engine = Engine(device, LIMITS, proposer=proposer)
        for name in "ABCD":
            engine.add(request(name, max_tokens=60))
        for _ in range(4):
            engine.step()
        engine.add(request("P", 60, 3))
        before = device.num_steps
        while not any(event.request_id == "P" and event.drawn for event in engine.step()):
            assert device.num_steps < 100
        steps.append(device.num_steps - before)
        finished(engine)
    assert steps[1] <= steps[0]


def test_prefixes_of_guessed_answers_are_found_again() -> None:
    """Pages are registered with tokens that are sure, so that the next ones chain on them."""
    engine = Engine(ScriptedDevice(LIMITS), LIMITS, proposer=partial(Guesser, 2))
    asked = request("A", max_tokens=20)
    engine.add(asked)
    answer = finished(engine)["A", 0]
    prompt = (*asked.prompt_ids, *answer[:13], 96)
    engine.add(replace(asked, id="B", prompt_ids=prompt, max_tokens=1))
    finished(engine)
    assert engine.scheduler.prefix_hit_tokens == 16  # all full pages of its first 18 tokens


def test_right_guesses_save_steps() -> None:
    """20 tokens: two alone, because nothing is known before; then 4 a step: 18 = 4 x 4 + 2."""
    device = ScriptedDevice(LIMITS)
    engine = Engine(device, LIMITS, proposer=partial(Guesser, 9999))
    engine.add(request("A", max_tokens=20))
    assert len(finished(engine)["A", 0]) == 20
    assert device.num_steps == 7


@pytest.mark.parametrize("place", ["before", "after", "drawn", "answer"])
def test_guesses_survive_a_step_that_fails(place: Place) -> None:
    asked = [request("A", max_tokens=20), request("B", 21, 13, n=2), request("s", 9)]
    for number in range(8):
        device = ScriptedDevice(
            LIMITS, lambda n, plans, fault=number: place if n == fault else None
        )
        engine = Engine(device, LIMITS, proposer=partial(Guesser, 3))
        for one in asked:
            engine.add(one)
        answers = finished(engine)
        for one in asked:
            for choice in range(one.n):
                assert answers[one.id, choice] == undisturbed(one, choice), one.id


class BrokenMasks(EvenTokens):
    """Cannot make the masks of the request "mad"."""

    def masks(self, plans: Sequence[StepPlan]) -> Masks:
        if any(chunk.request_id == "mad" for plan in plans for chunk in plan.chunks):
            raise ValueError("no such grammar")
        return super().masks(plans)


def test_a_mask_that_cannot_be_made_ends_its_request_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = ScriptedDevice(LIMITS)
    engine = Engine(device, LIMITS, masks=BrokenMasks())
    asked = [request("m1"), request("mad"), request("A")]
    for one in asked:
        engine.add(one)
    failed, answers = [], dict[str, list[int]]()
    while engine.has_work:
        for event in engine.step():
            if event.finish_reason is FinishReason.FAILED:
                failed.append(event.request_id)
            elif event.drawn is not None:
                answers.setdefault(event.request_id, []).append(event.drawn.token_id)
    assert failed == ["mad"] and device.num_resets == 0
    assert answers == {"m1": masked(asked[0]), "A": undisturbed(asked[2])}
    assert "no such grammar" in caplog.text and "request mad ends" in caplog.text
