"""Guesses: which of them the next step checks, so that it computes several tokens of an answer.

A step draws a token behind each guess as well, by the numbers that belong to its place, so that
answers are those without guesses: the guesses that turn out right save steps, the others cost their
places in one.

How many are worth their places follows from two estimates: the chance that a guess is right, which
each answer's guesser learns, and the time that a step of so many tokens takes, which is learnt from
steps (step_cost.py). Guesses are added, the likeliest first, as long as the tokens that are
expected from the step grow faster than its time. So a step that is full of answers has none.

The host plans a step before it knows what the one before draws, and a guess must follow a token
that is known. An answer whose guesses are likely right waits a step for that; the others go on.
"""

from collections.abc import Callable, Sequence

from serving.scheduling.guesser import Proposer
from serving.scheduling.sequence import SequenceState

MOST_GUESSES = 16  # of an answer in a step
_UNMEASURED_GUESSES = 4  # of a step, before the time of any is known
_WORTH_WAITING = 0.4  # the chance from which on an answer waits for its last token


Guesses = dict[SequenceState, tuple[int, ...]]


def propose(
    proposer: Proposer,
    decodes: Sequence[SequenceState],
    budget: int,
    seconds: Callable[[int], float | None],
) -> tuple[list[SequenceState], Guesses]:
    """Returns the sequences of the next step, and the guesses that are checked in it.

    Sequences whose last token must be known first are left out of the step.

    Args:
        proposer: makes guessers.
        decodes: sequences that lack one token.
        budget: number of tokens that the step has for them all.
        seconds: returns the time of a step of so many tokens; None while nothing is known of it.
    """
    spare = budget - len(decodes)
    if spare < 1:
        return [*decodes], {}
    ready: list[SequenceState] = []
    offered: Guesses = {}
    for sequence in decodes:
        count = min(MOST_GUESSES, sequence.limit - len(sequence.tokens) - 1)
        if not sequence.may_be_guessed or count < 1:
            ready.append(sequence)
            continue
        guesser = sequence.guesser = sequence.guesser or proposer(sequence.request)
        guesses = guesser.guess(sequence.tokens, count)
        if not sequence.undrawn:
            ready.append(sequence)
            if guesses:
                offered[sequence] = tuple(guesses[: min(spare, count)])
        elif len(guesses) < 2 or guesser.chance < _WORTH_WAITING:
            ready.append(sequence)
    return ready, _worth_their_places(offered, len(ready), spare, seconds)


def _worth_their_places(
    offered: Guesses, rows: int, spare: int, seconds: Callable[[int], float | None]
) -> Guesses:
    """Returns as many of the guesses as raise the number of tokens that a second yields most."""
    if not offered:
        return {}
    # A guess is right if those before it are too, so each answer's come in their order.
    chances = sorted(
        (
            (-(_chance(sequence) ** place), number, sequence)
            for number, (sequence, guesses) in enumerate(offered.items())
            for place in range(1, len(guesses) + 1)
        ),
        key=lambda entry: entry[:2],
    )[:spare]
    alone = seconds(rows)
    taken = min(len(chances), _UNMEASURED_GUESSES)
    if alone is not None:
        expected, taken, best = float(rows), 0, rows / alone
        for count, (minus_chance, _, _) in enumerate(chances, start=1):
            expected -= minus_chance
            lasting = seconds(rows + count)
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
