"""Guesses: which of them the next step checks, so that it computes several tokens of an answer.

A step draws a token behind each guess as well, by the numbers that belong to its place, so that
answers are those without guesses: the guesses that turn out right save steps, the others cost their
places in one.

How many are worth their places follows from two estimates: the chance that a guess is right, which
each answer's guesser learns, and the time that a step of such a size takes, which is learnt from
steps (step_cost.py). Guesses are added, the likeliest first, as long as the tokens that are
expected from the step grow faster than its time. So a step that is full of answers has none.

The host plans a step before it knows what the one before draws, and a guess must follow a token
that is known. An answer that would get guesses waits a step for that; the others go on.
"""

from collections.abc import Callable, Sequence

from serving.scheduling.guesser import Proposer
from serving.scheduling.sequence import SequenceState
from serving.scheduling.step_cost import StepSize

MOST_GUESSES = 16  # of an answer in a step
_UNMEASURED_GUESSES = 4  # of a step, before the time of any is known
_MANY = 8  # answers
_WORTH_WAITING = 0.4  # the chance from which on an answer waits for its last token

Guesses = dict[SequenceState, tuple[int, ...]]


class StepTimes:
    """Times of a step that some sequences are in, with guesses.

    Args:
        seconds: returns the estimated time of a step; None while nothing is known of any.
        window: positions that a token sees; None for all before it.
    """

    def __init__(
        self, seconds: Callable[[StepSize], float | None], window: int | None = None
    ) -> None:
        self._seconds, self._window = seconds, window
        self._size = StepSize()

    def begin(self, sequences: Sequence[SequenceState]) -> float | None:
        """Returns the time with one token of each."""
        self._size = StepSize().plus(((s.planned, 1) for s in sequences), self._window)
        return self._seconds(self._size)

    def with_guess(self, sequence: SequenceState, guesses: int) -> float | None:
        """Returns the time when a sequence has one guess more than `guesses`."""
        old = StepSize().plus([(sequence.planned, guesses + 1)], self._window)
        new = StepSize().plus([(sequence.planned, guesses + 2)], self._window)
        self._size = StepSize(*(s - a + b for s, a, b in zip(self._size, old, new, strict=True)))
        return self._seconds(self._size)


def propose(
    proposer: Proposer, decodes: Sequence[SequenceState], budget: int, times: StepTimes
) -> tuple[list[SequenceState], Guesses]:
    """Returns the sequences of the next step, and the guesses that are checked in it.

    Sequences whose last token must be known first are left out of the step.

    Args:
        proposer: makes guessers.
        decodes: sequences that lack one token.
        budget: number of tokens that the step has for them all.
        times: of steps.
    """
    spare = budget - len(decodes)
    guessed = [s for s in decodes if s.may_be_guessed and _room(s)]
    if spare < 1 or not guessed:
        return [*decodes], {}
    # Looking for guesses of few answers takes less time than seeing whether they might pay.
    if len(guessed) >= _MANY and not _may_pay(decodes, guessed[0], spare, times):
        return [*decodes], {}
    offered: Guesses = {}
    for sequence in guessed:
        guesser = sequence.guesser = sequence.guesser or proposer(sequence.request)
        guesses = tuple(guesser.guess(sequence.tokens, _room(sequence)))
        if sequence.undrawn:  # the first of them is the token that the open plan draws
            guesses = guesses[1:] if guesser.chance >= _WORTH_WAITING else ()
        if guesses:
            offered[sequence] = guesses
    worth = _worth_their_places(offered, decodes, spare, times)
    if not any(sequence.undrawn for sequence in worth):
        return [*decodes], worth
    ready = [s for s in decodes if not (s.undrawn and s in worth)]
    offered = {s: guesses for s, guesses in offered.items() if not s.undrawn}
    return ready, _worth_their_places(offered, ready, spare, times)


def _room(sequence: SequenceState) -> int:
    """Returns the number of guesses that an answer has room for: a token follows the last one."""
    return min(MOST_GUESSES, max(0, sequence.limit - len(sequence.tokens) - 1))


def _may_pay(
    decodes: Sequence[SequenceState], guessed: SequenceState, spare: int, times: StepTimes
) -> bool:
    """Returns True if guesses that are certain to be right would raise the tokens of a second."""
    rows, alone = len(decodes), times.begin(decodes)
    if alone is None:
        return True
    for count in range(min(spare, MOST_GUESSES)):
        lasting = times.with_guess(guessed, count)
        assert lasting is not None, "the time of steps is known"
        if (rows + count + 1) / lasting > rows / alone:
            return True
    return False


def _worth_their_places(
    offered: Guesses, rows: Sequence[SequenceState], spare: int, times: StepTimes
) -> Guesses:
    """Returns as many of the guesses as raise the number of tokens that a second yields most."""
    if not offered:
        return {}
    # A guess is right if those before it are too, so each answer's come in their order.
    chances = sorted(
        (
            (-(_chance(sequence) ** (place + bool(sequence.undrawn))), number, sequence)
            for number, (sequence, guesses) in enumerate(offered.items())
            for place in range(1, len(guesses) + 1)
        ),
        key=lambda entry: entry[:2],
    )[:spare]
    alone = times.begin(rows)
    taken = min(len(chances), _UNMEASURED_GUESSES)
    if alone is not None:
        expected, taken, best = float(len(rows)), 0, len(rows) / alone
        counts = dict.fromkeys(offered, 0)
        for count, (minus_chance, _, sequence) in enumerate(chances, start=1):
            expected -= minus_chance
            lasting = times.with_guess(sequence, counts[sequence])
            counts[sequence] += 1
            assert lasting is not None, "the time of steps is known"
            if expected / lasting > best:
                taken, best = count, expected / lasting
    counts = dict.fromkeys(offered, 0)
    for _, _, sequence in chances[:taken]:
        counts[sequence] += 1
    return {s: guesses[: counts[s]] for s, guesses in offered.items() if counts[s]}


def _chance(sequence: SequenceState) -> float:
    assert sequence.guesser is not None, "its guesses were offered"
    return sequence.guesser.chance
