"""Form: a grammar that was compiled and tried, from which each choice of a request gets a matcher.

It is what travels with a request from the service to the engine's thread.
"""

from dataclasses import dataclass

import numpy as np

from mixtral_jax.structure.matcher import Guide, Matcher
from mixtral_jax.structure.specification import Check, Grammar

_TRIED_TOKENS = 2


@dataclass(frozen=True, eq=False)
class Form:
    """Compiled grammar that an answer must match, ready to be used."""

    warm: Matcher
    """A matcher at the beginning, which is copied and never moved."""
    begins_after: int | None = None
    """The control id after which the grammar begins; until it is drawn nothing is masked, and the
    answer may end. The matcher takes in that id first. None: it begins with the first token."""
    weakened: tuple[str, ...] = ()
    """What the answer is not held to though the caller asked for it, each with its pointer."""
    checks: tuple[Check, ...] = ()
    """Schemas that the finished answer is to be checked against."""
    grammar: str = ""
    """The text of the grammar, for another process that makes the same form of it."""

    def matcher(self) -> Matcher:
        """Returns a matcher for one choice."""
        return self.warm.copy()


def form_of(grammar: Grammar, guide: Guide) -> Form:
    """Returns the form of a grammar after a trial: masks are computed along a few tokens.

    Some grammars compile and cannot be matched, and the trial also leaves the form warm. Raises
    StructureError.
    """
    matcher = guide.matcher(grammar.text)
    mask = np.zeros(guide.words, np.int32)
    if grammar.begins_after is not None:
        matcher.consume([grammar.begins_after])
    for _ in range(_TRIED_TOKENS):
        matcher.fill(mask)
        token_id = _longest_allowed(mask, guide)
        if token_id is None:
            break  # the answer can only end here
        matcher.consume([token_id])
    else:
        matcher.fill(mask)
    matcher.rewind()
    return Form(matcher, grammar.begins_after, grammar.weakened, grammar.checks, grammar.text)


def _longest_allowed(mask: np.ndarray, guide: Guide) -> int | None:
    """Returns the id with the most bytes of those that are in a mask; None if all are controls."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: guide.width]
    lengths = bits * guide.text_lengths
    token_id = int(lengths.argmax())
    return token_id if lengths[token_id] else None
