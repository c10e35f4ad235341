"""Guesses: which of them the next step checks, so that it computes several tokens of an answer.

A step draws a token behind each guess as well, by the numbers that belong to its place, so that
answers are those without guesses: the guesses that turn out right save steps, the others cost their
places in one. How many are worth these: worth.py.

The host plans a step before it knows what the one before draws, and a guess must follow a token
that is known. An answer that would get guesses waits a step for that; the others go on.
"""

from collections.abc import Sequence

from serving.scheduling.guesses.guesser import Proposer
from serving.scheduling.guesses.worth import (
    MOST_GUESSES,
    Guesses,
    Offer,
    StepTimes,
    worth_their_places,
)
from serving.scheduling.sequence import SequenceState

_MANY = 8  # answers
_WORTH_WAITING = 0.4  # the chance from which on an answer waits for its last token


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
    guessed = [s for s in decodes if s.may_be_guessed and room(s)]
    if spare < 1 or not guessed:
        return [*decodes], {}
    # Looking for guesses of few answers takes less time than seeing whether they might pay.
    if len(guessed) >= _MANY and not _may_pay(decodes, guessed[0], spare, times):
        return [*decodes], {}
    offered: Guesses = {}
    for sequence in guessed:
        guesser = sequence.guesser = sequence.guesser or proposer(sequence.request)
        guesses = tuple(guesser.guess(sequence.tokens, room(sequence)))
        if sequence.undrawn:  # the first of them is the token that the open plan draws
            guesses = guesses[1:] if guesser.chance >= _WORTH_WAITING else ()
        if guesses:
            offered[sequence] = guesses
    worth = _worth(offered, decodes, spare, times)
    if not any(sequence.undrawn for sequence in worth):
        return [*decodes], worth
    ready = [s for s in decodes if not (s.undrawn and s in worth)]
    offered = {s: guesses for s, guesses in offered.items() if not s.undrawn}
    return ready, _worth(offered, ready, spare, times)


def room(sequence: SequenceState) -> int:
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


def _worth(
    offered: Guesses, rows: Sequence[SequenceState], spare: int, times: StepTimes
) -> Guesses:
    """Returns as many of the guesses as are worth their places."""
    offers = {s: Offer(len(guesses), _chance(s), s.undrawn) for s, guesses in offered.items()}
    counts = worth_their_places(offers, rows, spare, times)
    return {s: offered[s][:count] for s, count in counts.items()}


def _chance(sequence: SequenceState) -> float:
    assert sequence.guesser is not None, "its guesses were offered"
    return sequence.guesser.chance
