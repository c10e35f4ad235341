"""Which answers a draft model is asked about, and for how many guesses."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest

from serving.scheduling.guesses.drafts import propose_drafts
from serving.scheduling.guesses.worth import Guesses, RoundTimes, StepTimes
from serving.scheduling.sequence import SequenceState
from tests.serving.scheduling.guesses.test_proposer import Certain, sequence


class Scripted:
    """Takes `cost` for a round, whoever is in it, and guesses 7 again and again."""

    def __init__(self, cost: float | None, chance: float = 0.8, room: int = 99) -> None:
        self.cost, self._chance, self._room = cost, chance, room
        self.num_drafts = 0
        self.behind: Sequence[SequenceState] = ()
        self.asked: dict[SequenceState, int] = {}
        self.computed: list[SequenceState] = []

    def chance(self, sequence: SequenceState) -> float:
        return self._chance

    def room(self, sequence: SequenceState) -> int:
        return self._room

    def is_behind(self, sequence: SequenceState) -> bool:
        return sequence in self.behind

    def round_times(self) -> RoundTimes | None:
        cost = self.cost
        return None if cost is None else lambda answers: cost

    def draft(
        self,
        wanted: Mapping[SequenceState, int],
        behind: Collection[SequenceState],
        *,
        is_alone: bool,
    ) -> Guesses:
        self.asked, self.computed = dict(wanted), [*behind]
        return {s: (7,) * count for s, count in wanted.items()}


def answer(undrawn: int = 0, **given: Any) -> Any:
    return sequence(Certain(), undrawn, **given)


def proposed(
    drafter: Scripted, answers: Sequence[SequenceState], budget: int = 32
) -> list[int | None]:
    """The number of guesses of each answer, beside which a step of any size takes 10.

    None for those that wait.
    """
    times = StepTimes(lambda size: 10.0, guessing=drafter.round_times)
    ready, guesses = propose_drafts(drafter, answers, budget, times, is_alone=True)
    return [len(guesses.get(s, ())) if s in ready else None for s in answers]


@pytest.mark.parametrize(
    ("cost", "chance", "count"),
    [
        (0.0, 0.5, 16),  # nothing is lost by any guess
        (
            1.0,
            0.8,
            6,
        ),  # five give 3.69 in 15, six 3.95 in 16, and seven 4.16 in 17
        (5.0, 0.8, 2),  # 1.8 in 15 is more than 1 in 10, 2.44 in 20 more than that, 2.95 in 25 less
        (9.0, 0.8, 0),  # 1.8 tokens in 19
        (None, 0.8, 4),  # before any was measured
    ],
)
def test_guesses_are_made_while_the_tokens_grow_faster_than_both_times(
    cost: float | None, chance: float, count: int
) -> None:
    drafter = Scripted(cost, chance)
    asked = answer()
    assert proposed(drafter, [asked]) == [count]
    assert drafter.asked == ({asked: count} if count else {})


def test_a_round_is_shared_by_all_who_are_guessed_in_it() -> None:
    """A round takes 5, and 1 for each answer: the first has one and then two, the second one."""
    times = StepTimes(lambda size: 10.0, guessing=lambda: lambda answers: 5.0 + answers)
    first, second = answer(), answer()
    assert times.begin([first, second]) == 10.0
    assert times.with_guess(first, 0) == 10 + 6
    assert times.with_guess(second, 0) == 10 + 7
    assert times.with_guess(first, 1) == 10 + 7 + 6
    assert times.begin([first]) == 10.0


def test_whose_last_token_is_not_known_waits_for_it() -> None:
    drafter, known, open_ = Scripted(5.0), answer(), answer(undrawn=1)
    assert proposed(drafter, [known, open_]) == [2, None]
    assert [*drafter.asked] == [known]


def test_of_whom_it_lacks_much_the_answer_goes_on_meanwhile() -> None:
    """With two answers 3.95 tokens in 16 are more than 2 in 10, and 4.36 in 18 are less."""
    drafter, known, late = Scripted(2.0), answer(), answer(undrawn=1)
    drafter.behind = [late]
    assert proposed(drafter, [known, late]) == [3, 0]
    assert ([*drafter.asked], drafter.computed) == ([known], [late])


def test_nothing_is_asked_of_it_where_no_guess_pays() -> None:
    dear, cheap = Scripted(9.0), Scripted(1.0)
    dear.behind = [late := answer(undrawn=1)]
    assert proposed(dear, [late, answer(undrawn=1)]) == [0, 0]
    assert proposed(cheap, [answer(), answer(undrawn=1)], budget=2) == [0, 0]
    assert not (dear.asked or dear.computed or cheap.asked)


@pytest.mark.parametrize(
    ("given", "room", "count"),
    [
        ({}, 3, 3),  # of the draft's context
        ({"max_tokens": 4}, 99, 2),  # of 4 tokens one is there; the last one follows a guess
        ({"min_tokens": 3}, 99, 0),
        ({"form": object()}, 99, 0),
        ({"allowed_ids": frozenset({1})}, 99, 0),
    ],
)
def test_guesses_end_where_they_must(given: dict[str, Any], room: int, count: int) -> None:
    assert proposed(Scripted(0.0, room=room), [answer(**given)]) == [count]


def test_a_full_batch_is_not_looked_at_guess_by_guess() -> None:
    """Of 8 answers, each token of which takes 1, no guess pays, however likely."""
    counted: list[int] = []
    times = StepTimes(
        lambda size: counted.append(size.tokens) or float(size.tokens),
        guessing=Scripted(0.1).round_times,
    )
    drafter = Scripted(0.1, chance=1.0)
    answers = [answer() for _ in range(8)]
    assert propose_drafts(drafter, answers, 64, times, is_alone=True) == (answers, {})
    assert len(counted) < 12
