"""Pace: which tokens of a choice go out in one chunk.

A chunk costs the service, the gateway and the client the same, whether it has one token or four. A
stream that keeps up gets each token as soon as it is there; one that is behind, whose next token
has come before this one was sent, gets them together. Nothing waits for that: the tokens that are
put together are all there.
"""

from dataclasses import dataclass
from typing import Protocol

MAX_TOKENS = 4
"""Most tokens that are put together because a stream is behind."""
MAX_SECONDS = 0.05
"""Longest time from the first of them to the last."""


class Unsent(Protocol):
    """A choice, as far as it tells what it has to send."""

    num_chunks: int  # that it has sent
    since: float  # time.monotonic() at which the first of its text came

    @property
    def num_tokens(self) -> int:
        """Number of its tokens."""

    @property
    def has_calls(self) -> bool:
        """True if it has calls, behind which no text fits into the same chunk."""


@dataclass(frozen=True)
class Pace:
    """Decides when the tokens of a choice that goes on are sent.

    Args:
        interval: Tokens of a chunk, but for the first one and the last one; with 1 they go out as
            fast as they are read.
    """

    interval: int = 1

    def sends(self, choice: Unsent, next_came: float | None) -> bool:
        """Returns True if what a choice has is to be sent now.

        Args:
            choice: The choice.
            next_came: time.monotonic() at which the next event of the answer came; None if it has
                not come yet.
        """
        if choice.has_calls or not choice.num_chunks:
            return True
        count = choice.num_tokens
        if count < self.interval:
            return False
        return next_came is None or count >= MAX_TOKENS or next_came - choice.since > MAX_SECONDS


EVERY_TOKEN = Pace()
