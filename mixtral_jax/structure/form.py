"""Form: a grammar that was compiled and tried, from which each choice of a request gets a matcher.

It is what travels with a request from the service to the engine's thread.
"""

from dataclasses import dataclass

from mixtral_jax.structure.matcher import Matcher


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

    def matcher(self) -> Matcher:
        """Returns a matcher for one choice."""
        return self.warm.copy()
