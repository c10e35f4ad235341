"""Device: what the engine's loop asks of the devices, and of those who say what may be drawn.

The real one is the Runner (runner.py); tests have one in plain Python that fails when it is told
to. The loop calls no jax.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from serving.scheduling.request import Event, Request, RowDraws
from serving.scheduling.step_plan import StepPlan


class Launched(Protocol):
    """A step that the devices compute."""

    def drawn(self) -> Sequence[Sequence[RowDraws]]:
        """Waits for the step; returns what each chunk of each plan drew, or None for nothing.

        Raises whatever has gone wrong on the devices meanwhile; the pages are then lost.
        """


@dataclass(frozen=True, eq=False)
class Masks:
    """The tokens that rows of one step may draw."""

    allowed: tuple[np.ndarray | None, ...]
    """Of each plan [chunks ceil(V / 32)] i32: bit i of word w is set if the chunk's row may draw
    the id 32 w + i. None where every row of the plan may draw any."""
    late: frozenset[tuple[int, int]] = frozenset()
    """(plan, chunk) of rows whose mask is not known yet: they sit this step out."""
    forced: Mapping[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    """The only tokens that can come next in a row, by (plan, chunk): it has them at once, and what
    it draws is passed over."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Requests of which no mask can be made, and what their callers are told: they end."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """The same for requests whose own parameters let no token follow."""


@dataclass(frozen=True)
class Walk:
    """A step that other hosts compute up to where its rows draw; they wait for its Masks then."""

    plans: tuple[StepPlan, ...]


@dataclass(frozen=True)
class PutLayer:
    """One layer of an adapter, with its scaling folded into B, for a slot of the stacks."""

    slot: int
    layer: int
    matrices: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """A and B of each target; see `mixtral_jax.model.adapter.LowRank`."""


Order = tuple[StepPlan, ...] | Walk | Masks | PutLayer
"""What other hosts are told: the plans of a whole step, or its two parts one after the other; and
the layers of an adapter that is loaded between steps."""


class MaskSource(Protocol):
    """Says which tokens may follow, for rows whose answer has a form, such as a grammar."""

    def add(self, request: Request) -> Request:
        """Takes in a request; returns it as it must be scheduled."""

    def forget(self, request_id: str, choice: int | None = None) -> None:
        """Forgets a request that has ended, or one choice of it."""

    def has_rows(self, plans: Sequence[StepPlan]) -> bool:
        """Returns True if any row of this step needs a mask."""

    def advance(self, events: Sequence[Event]) -> None:
        """Takes in what has happened, in every turn: the tokens of earlier steps before `masks`.

        What it raises ends the engine. What `masks` raises is a fault of its step.
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
