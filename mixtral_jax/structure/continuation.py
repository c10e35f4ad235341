"""Continuation: what may follow in an answer that has a form, token by token.

The engine and the plain loop each use it, so that they give the same answers.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from mixtral_jax.structure.matcher import Matcher


class Continuation:
    """Place of one answer in its form: the tokens that must come next, and those that may.

    Args:
        matcher: of this answer alone; it is moved.
    """

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher
        self.forced: deque[int] = deque()
        """Tokens that must come next, to be taken away as they come. The matcher has them."""
        self.mask = np.zeros(matcher.words, np.int32)
        """Tokens that may follow the forced ones: bit i of word w stands for the id 32 w + i."""

    def advance(self, token_ids: Sequence[int]) -> None:
        """Takes in tokens that were drawn, and finds what may follow. Raises StructureError."""
        self._matcher.consume(token_ids)
        while certain := self._certain():
            self.forced.extend(certain)
            if certain[-1] in self._matcher.end_ids:
                return
            self._matcher.consume(certain)

    def next_mask(self) -> np.ndarray:
        """Returns the mask of the next token: of the first forced one alone, if there is any."""
        if not self.forced:
            return self.mask
        token_id = self.forced[0]
        only = np.zeros(len(self.mask), np.uint32)
        only[token_id // 32] = 1 << token_id % 32
        return only.view(np.int32)

    def _certain(self) -> tuple[int, ...]:
        """Returns tokens that must come next; none if several may, of which `mask` has all.

        Where nothing but the end may follow, the first of the ids that say so is certain.
        """
        if forced := self._matcher.forced():
            return forced
        self._matcher.fill(self.mask)
        count = int(np.bitwise_count(self.mask.view(np.uint32)).sum())
        if count > len(self._matcher.end_ids):
            return ()
        bits = np.unpackbits(self.mask.view(np.uint8), bitorder="little")
        ids: list[int] = np.flatnonzero(bits).tolist()
        return (ids[0],) if len(ids) == 1 or self._matcher.end_ids.issuperset(ids) else ()
