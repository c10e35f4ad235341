"""Continuation: what may follow in an answer that has a form, token by token.

The engine and the plain loop each use it, so that they give the same answers.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from mixtral_jax.structure.form import Form
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


class FormProgress:
    """Place of an answer in its form, for a loop that draws one token after the other.

    An answer without a form may go on with any token.

    Args:
        form: of the answer; None if it may be anything.
        takes_turns: draws forced tokens too, so that they have logprobs.
    """

    def __init__(self, form: Form | None, takes_turns: bool) -> None:
        self._takes_turns = takes_turns
        self._trigger = None if form is None else form.begins_after
        self._continuation = None if form is None else Continuation(form.matcher())
        self._begins = self._continuation is not None and self._trigger is None
        if self._begins and self._continuation is not None:
            self._continuation.advance(())

    def forced(self) -> int | None:
        """Takes away and returns the token that must come next, where no step need draw it."""
        if self._begins and not self._takes_turns and self._continuation is not None:
            return self._continuation.forced.popleft() if self._continuation.forced else None
        return None

    def mask(self) -> np.ndarray | None:
        """Returns the mask of the next token, [ceil(V / 32)]; None if any may follow."""
        if not self._begins or self._continuation is None:
            return None
        return self._continuation.next_mask()

    def take(self, token_id: int) -> None:
        """Takes in a token that was drawn. Raises StructureError."""
        if self._continuation is None:
            return
        self._begins = self._begins or token_id == self._trigger
        if self._begins and self._continuation.forced:
            self._continuation.forced.popleft()
        elif self._begins:
            self._continuation.advance([token_id])
