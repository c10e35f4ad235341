"""Worth: how many of the guesses that there may be raise the tokens of a second.

It follows from two estimates: the chance that a guess of an answer is right, and the time that a
step of such a size takes, which is learnt from steps (step_cost.py), with the time that it takes to
make the guesses, where that takes any. Guesses are added, the likeliest first, as long as the
tokens that are expected from the step grow faster than its time. So a step that is full of answers
has none.

A draft model makes the first guesses of all answers in a step of its own, then the second ones, and
so on: a guess costs no more than a place in such a step, but for the first one of a round.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from serving.scheduling.guesses.guess_costs import GuessCosts
from serving.scheduling.sequence import SequenceState
from serving.scheduling.step_cost import StepSize

MOST_GUESSES = 16  # of an answer in a step
_UNMEASURED_GUESSES = 4  # of a step, before the time of any is known

Guesses = dict[SequenceState, tuple[int, ...]]
RoundTimes = Callable[[int], float]
"""Returns the seconds in which so many answers are guessed a token each."""


class Offer(NamedTuple):
    """Guesses that there may be of an answer."""

    limit: int
    chance: float  # that one is right where those before it are
    ahead: int = 0  # guesses that must be right before the first of them can be


class StepTimes:
    """Times of a step that some sequences are in, with guesses.

    Args:
        seconds: returns the estimated time of a step; None while nothing is known of any.
        window: positions that a token sees; None for all before it.
        guessing: returns what estimates the time of a round in which so many answers are guessed a
            token each, or None while nothing is known of it; None for guesses that take no time.
        costs: how much longer steps with guesses take than others of their size.
    """

    def __init__(
        self,
        seconds: Callable[[StepSize], float | None],
        window: int | None = None,
        guessing: Callable[[], RoundTimes | None] | None = None,
        costs: GuessCosts | None = None,
    ) -> None:
        self._estimate, self._window = seconds, window
        self._costs = costs or GuessCosts()
        self._guessing = guessing
        self._size = StepSize()
        self._guesses = 0
        self._round_times: RoundTimes | None = None
        self._rounds: list[int] = []  # answers that are guessed in each
        self._guessing_seconds = 0.0

    def begin(self, sequences: Sequence[SequenceState]) -> float | None:
        """Returns the time with one token of each."""
        self._size = StepSize().plus(((s.planned, 1) for s in sequences), self._window)
        self._guesses, self._rounds, self._guessing_seconds = 0, [], 0.0
        if self._guessing is not None:
            self._round_times = self._guessing()
            if self._round_times is None:
                return None
        return self._estimate(self._size)

    def with_guess(self, sequence: SequenceState, guesses: int) -> float | None:
        """Returns the time when a sequence has one guess more than `guesses`."""
        old = StepSize().plus([(sequence.planned, guesses + 1)], self._window)
        new = StepSize().plus([(sequence.planned, guesses + 2)], self._window)
        self._size = StepSize(*(s - a + b for s, a, b in zip(self._size, old, new, strict=True)))
        self._guesses += 1
        seconds, of_round = self._seconds(self._size, self._guesses), self._round_times
        if of_round is None or seconds is None:
            return seconds
        if guesses == len(self._rounds):
            self._rounds.append(0)
        before = self._rounds[guesses]
        self._guessing_seconds += of_round(before + 1) - (of_round(before) if before else 0.0)
        self._rounds[guesses] += 1
        return seconds + self._guessing_seconds

    def of_rounds(self, answers: int, rounds: int) -> float | None:
        """Returns about the time in which so many of the sequences have a guess of each round.

        For `begin`'s sequences without guesses, as if all of them saw the same number of positions.
        """
        tokens, context, pairs = self._size
        seen, more = context // max(1, tokens), answers * rounds
        chunks = (rounds + 1) * answers * seen
        size = StepSize(tokens + more, context - answers * seen, pairs + chunks)
        seconds = self._seconds(size, more)
        if seconds is None or self._round_times is None:
            return seconds
        return seconds + rounds * self._round_times(answers)

    def _seconds(self, size: StepSize, guesses: int) -> float | None:
        seconds = self._estimate(size)
        return None if seconds is None else seconds * self._costs.ratio(guesses)


def worth_their_places(
    offers: Mapping[SequenceState, Offer],
    rows: Sequence[SequenceState],
    spare: int,
    times: StepTimes,
) -> dict[SequenceState, int]:
    """Returns the numbers of guesses with which a second yields most tokens, without zeros.

    Args:
        offers: what may be guessed.
        rows: sequences of the step.
        spare: number of places for guesses.
        times: of such a step.
    """
    if not offers:
        return {}
    # A guess is right if those before it are too, so each answer's come in their order.
    chances = sorted(
        (
            (-(offer.chance ** (place + offer.ahead)), number, sequence)
            for number, (sequence, offer) in enumerate(offers.items())
            for place in range(1, offer.limit + 1)
        ),
        key=lambda entry: entry[:2],
    )[:spare]
    alone = times.begin(rows)
    taken = min(len(chances), _UNMEASURED_GUESSES)
    if alone is not None:
        expected, taken, best = float(len(rows)), 0, len(rows) / alone
        counts = dict.fromkeys(offers, 0)
        for count, (minus_chance, _, sequence) in enumerate(chances, start=1):
            expected -= minus_chance
            lasting = times.with_guess(sequence, counts[sequence])
            counts[sequence] += 1
            assert lasting is not None, "the time of steps is known"
            if expected / lasting > best:
                taken, best = count, expected / lasting
    counts = dict.fromkeys(offers, 0)
    for _, _, sequence in chances[:taken]:
        counts[sequence] += 1
    return {sequence: count for sequence, count in counts.items() if count}
