"""Guesser: guesses the next tokens of an answer, so that a step can check several at once."""

from collections.abc import Callable, Sequence
from typing import Protocol

from serving.scheduling.request import Request

_RATE = 0.15  # by which the newest guess moves a chance


class Guesser(Protocol):
    """Guesses the tokens of one answer."""

    @property
    def chance(self) -> float:
        """The chance that the next guess is right."""

    def guess(self, tokens: Sequence[int], count: int) -> Sequence[int]:
        """Returns at most `count` tokens that may come next; none where it has no idea.

        Args:
            tokens: Prompt and answer so far, which must not be changed; more of them in each call.
            count: Number of tokens that there is room for.
        """


Proposer = Callable[[Request], Guesser]
"""Makes the guesser of each answer to a request."""


def learnt_chance(chance: float, guesses: Sequence[int], tokens: Sequence[int]) -> float:
    """Returns the chance of a right guess when it is known which tokens came in their places.

    The newest guesses count most. Behind the first wrong one none counts: it followed a token that
    did not come.
    """
    for guess, token in zip(guesses, tokens, strict=False):
        chance += _RATE * ((guess == token) - chance)
        if guess != token:
            break
    return chance
