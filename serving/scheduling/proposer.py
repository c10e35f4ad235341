"""Proposer: guesses the next tokens of an answer, so that a step can check several at once."""

from collections.abc import Sequence
from typing import Protocol

from serving.scheduling.request import Request


class Proposer(Protocol):
    """Guesses tokens. A wrong guess costs its place in a step and changes no answer."""

    def propose(self, request: Request, tokens: Sequence[int], count: int) -> Sequence[int]:
        """Returns at most `count` tokens that may come next; none where it has no idea.

        Args:
            request: What was asked.
            tokens: Prompt and answer so far, which must not be changed.
            count: Number of tokens that there is room for.
        """
