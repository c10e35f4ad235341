"""Which guesses are worth their places: a step's time against the tokens that it yields."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mixtral_jax.sampling_params import SamplingParams
from serving.scheduling.guesses.proposer import propose
from serving.scheduling.guesses.worth import StepTimes
from serving.scheduling.pages import PagePool, PageTable
from serving.scheduling.request import Request
from serving.scheduling.sequence import SequenceState, Turn
from serving.scheduling.step_cost import StepSize


class Certain:
    """Guesses the same token again and again."""

    def __init__(self, chance: float = 1.0, length: int = 99) -> None:
        self.chance, self.length = chance, length

    def guess(self, tokens: Sequence[int], count: int) -> Sequence[int]:
        return [tokens[-1]] * min(count, self.length)


def sequence(guesser: Certain, undrawn: int = 0, max_tokens: int = 90, **request: Any) -> Any:
    asked = Request(
        id="A",
        prompt_ids=(1, 2),
        sampling=SamplingParams(),
        max_tokens=max_tokens,
        eos_ids=frozenset(),
        **request,
    )
    return SequenceState(
        request=asked,
        turn=Turn("a"),
        choice=0,
        arrival=1,
        seed=0,
        limit=2 + max_tokens,
        tokens=[1, 2, 3],
        table=PageTable(PagePool(8, 4, True), b""),
        planned=2 + undrawn,
        undrawn=undrawn,
        guesser=guesser,
    )


def flat(tokens: int) -> float:
    """A step of up to 8 tokens takes as long as one, 8; behind that each takes 0.8."""
    return 8.0 + 0.8 * max(0, tokens - 8)


def checked(
    sequences: list[SequenceState],
    budget: int = 32,
    seconds: Callable[[int], float | None] = flat,
) -> list[int | None]:
    """The number of guesses of each sequence; None for those that wait."""

    def proposer(request: Request) -> Certain:
        raise AssertionError(f"each has a guesser already, also {request.id}")

    times = StepTimes(lambda size: seconds(size.tokens))
    ready, guesses = propose(proposer, sequences, budget, times)
    return [len(guesses.get(s, ())) if s in ready else None for s in sequences]


@pytest.mark.parametrize(
    ("chances", "counts"),
    [
        ([0.5], [7]),  # all that are free
        ([0.99], [16]),  # likely enough to pay for their time, up to the most
        ([0.0], [0]),
        ([0.9, 0.6], [5, 1]),  # 0.9^4 is above 0.6, which is above 0.9^5, and that above 0.6^2
        ([0.7] * 8, [0] * 8),  # nothing is free any more: 0.7 tokens for a tenth of 8 tokens' time
    ],
)
def test_guesses_are_added_while_a_second_yields_more(
    chances: list[float], counts: list[int]
) -> None:
    assert checked([sequence(Certain(chance)) for chance in chances]) == counts


def test_before_any_step_was_measured_there_are_few() -> None:
    assert checked([sequence(Certain())], seconds=lambda tokens: None) == [4]


@pytest.mark.parametrize(("budget", "count"), [(1, 0), (2, 1), (5, 4)])
def test_guesses_fit_beside_the_answers(budget: int, count: int) -> None:
    assert checked([sequence(Certain())], budget) == [count]


def test_guesses_end_where_the_answer_does() -> None:
    """Of 4 tokens one is there; the last one follows a guess."""
    assert checked([sequence(Certain(), max_tokens=4)]) == [2]


@pytest.mark.parametrize(
    ("guesser", "waits"),
    [(Certain(0.4), True), (Certain(0.39), False), (Certain(1.0, length=1), False)],
)
def test_an_answer_waits_for_its_last_token_where_a_guess_behind_it_is_likely(
    guesser: Certain, waits: bool
) -> None:
    assert checked([sequence(guesser, undrawn=1)]) == [None if waits else 0]


def test_where_no_place_is_left_nobody_waits() -> None:
    assert checked([sequence(Certain(), undrawn=1) for _ in range(3)], budget=3) == [0] * 3


def test_who_would_get_no_guess_does_not_wait() -> None:
    """Eight answers fill what is free, and the likely ones' guesses cost more than they yield."""
    full = [sequence(Certain(0.7), undrawn=1) for _ in range(8)]
    assert checked(full) == [0] * 8
    few = [sequence(Certain(0.7), undrawn=1), sequence(Certain(0.1), undrawn=1)]
    assert checked(few) == [None, 0]


def test_nothing_is_looked_up_where_the_right_guess_would_not_pay() -> None:
    class Unasked(Certain):
        def guess(self, tokens: Sequence[int], count: int) -> Sequence[int]:
            raise AssertionError("it costs the engine's thread time")

    full = [sequence(Unasked()) for _ in range(8)]
    assert checked(full, seconds=lambda tokens: float(tokens)) == [0] * 8


def test_a_guess_costs_the_positions_that_it_sees() -> None:
    """At the position 2 a token alone sees 3; with two guesses they see 3, 4 and 5 as pairs."""
    told: list[StepSize] = []
    times = StepTimes(lambda size: told.append(size) or 1.0)
    answer, other = sequence(Certain()), sequence(Certain())
    times.begin([answer, other])
    times.with_guess(answer, 0)
    times.with_guess(answer, 1)
    assert told == [StepSize(2, 6, 0), StepSize(3, 3, 7), StepSize(4, 3, 12)]


@pytest.mark.parametrize(
    "request_", [{"min_tokens": 3}, {"form": object()}, {"allowed_ids": frozenset({1})}]
)
def test_answers_whose_draws_need_more_than_tokens_are_not_guessed(
    request_: dict[str, Any],
) -> None:
    assert checked([sequence(Certain(), **request_)]) == [0]
    assert checked([sequence(Certain(), undrawn=1, **request_)]) == [0]
