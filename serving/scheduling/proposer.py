"""Proposer: guesses the next tokens of an answer, so that a step can check several at once."""

from collections.abc import Sequence
from typing import Protocol

from serving.scheduling.request import Request
from serving.scheduling.sequence import SequenceState


class Proposer(Protocol):
    """Guesses tokens. A wrong guess costs its place in a step and changes no answer."""

    def propose(self, request: Request, tokens: Sequence[int], count: int) -> Sequence[int]:
        """Returns at most `count` tokens that may come next; none where it has no idea.

        Args:
            request: What was asked.
            tokens: Prompt and answer so far, which must not be changed.
            count: Number of tokens that there is room for.
        """


def propose(
    proposer: Proposer, decodes: Sequence[SequenceState], budget: int
) -> tuple[list[SequenceState], dict[SequenceState, tuple[int, ...]]]:
    """Returns the sequences of the next step, and the guesses that are checked in it.

    Sequences whose last token must be known first are left out of the step.

    Args:
        proposer: guesses.
        decodes: sequences that lack one token.
        budget: number of tokens that the step has for them all.
    """
    ready = [s for s in decodes if not (s.undrawn and s.may_be_guessed)]
    guesses: dict[SequenceState, tuple[int, ...]] = {}
    spare = budget - len(ready)
    for sequence in ready:
        count = min(spare, sequence.limit - len(sequence.tokens) - 1)
        if sequence.may_be_guessed and count > 0:
            proposed = proposer.propose(sequence.request, sequence.tokens, count)
            guesses[sequence] = tuple(proposed[:count])
            spare -= len(guesses[sequence])
    return ready, guesses
