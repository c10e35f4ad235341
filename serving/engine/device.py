"""Device: what the engine's loop asks of the devices, and of those who say what may be drawn.

The real one is the Runner (runner.py); tests have one in plain Python that fails when it is told
to. The loop needs no jax.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from serving.scheduling.request import Event, RowDraws
from serving.scheduling.step_plan import StepPlan


class Launched(Protocol):
    """A step that the devices compute."""

    def drawn(self) -> Sequence[Sequence[RowDraws]]:
        """Waits for the step; returns what each chunk of each plan drew, or None for nothing.

        Raises whatever has gone wrong on the devices meanwhile; the pages are then lost.
        """


@dataclass(frozen=True)
class Masks:
    """The tokens that rows of one step may draw, by plan and chunk."""

    allowed: tuple[tuple[frozenset[int] | None, ...], ...]
    """Ids that each row may draw; None for all of them."""
    late: frozenset[tuple[int, int]] = frozenset()
    """(plan, chunk) of rows whose mask is not known yet: they sit this step out."""
    forced: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """The only token that a row may have, by (plan, chunk), whatever it draws."""


class MaskSource(Protocol):
    """Says which tokens may follow, for rows whose answer has a form, such as a grammar."""

    def has_rows(self, plans: Sequence[StepPlan]) -> bool:
        """Returns True if any row of this step needs a mask."""

    def advance(self, events: Sequence[Event]) -> None:
        """Takes in what has happened, in every turn: the tokens of earlier steps before `masks`.

        What it raises ends the engine. Whatever is wrong with one request is raised by `masks`,
        which is a fault of its step, so that this request is found.
        """

    def masks(self, plans: Sequence[StepPlan]) -> Masks:
        """Returns the masks of a step that was walked."""


class Device(Protocol):
    """Computes steps in the order in which they are launched. Used by one thread."""

    @property
    def num_partitions(self) -> int:
        """Number of plans of a step."""

    def launch(self, plans: Sequence[StepPlan]) -> Launched:
        """Starts a step in which every row may draw any token, without waiting for it.

        At least one of the plans has chunks.
        """

    def walk(self, plans: Sequence[StepPlan]) -> Any:
        """Starts a step, up to where its rows draw."""

    def draw(self, walked: Any, masks: Masks) -> Launched:
        """Lets the rows of a step that was walked draw what their masks allow."""

    def is_intact(self) -> bool:
        """Returns False if a step that raised has taken pages of earlier steps with it."""

    def reset(self) -> None:
        """Makes new pages; the content of all earlier ones is lost."""
