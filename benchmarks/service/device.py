"""InstantDevice: a device that has every step's tokens as soon as the step is launched.

It stands in the engine's place for its devices (`serving.engine.device.Device`) and computes
nothing: each row draws the next of a few tokens. What a service then takes is its own time.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from serving.scheduling.request import Drawn, RowDraws
from serving.scheduling.step_plan import StepPlan


class InstantDevice:
    """Draws fixed tokens.

    Args:
        token_ids: The tokens that rows draw, in turn by the place in their sequence.
        seconds: Time of a step, which a real device would take; 0 answers at once.
    """

    num_partitions = 1

    def __init__(self, token_ids: Sequence[int], seconds: float = 0.0) -> None:
        self._draws = [Drawn(token_id=token_id) for token_id in token_ids]
        self._seconds = seconds
        self._free = 0.0  # time.monotonic() at which the last step that was launched ends

    def launch(self, plans: Sequence[StepPlan]) -> "InstantStep":
        """Starts a step behind those that were launched before it."""
        draws = self._draws
        count = len(draws)
        rows: list[list[RowDraws]] = [
            [draws[chunk.end % count] if chunk.samples else None for chunk in plan.chunks]
            for plan in plans
        ]
        self._free = max(self._free, time.monotonic()) + self._seconds
        return InstantStep(rows, self._free if self._seconds else 0.0)

    def walk(self, plans: Sequence[StepPlan]) -> NoReturn:
        """Rows have no masks here."""
        raise NotImplementedError

    def draw(self, walked: object, masks: object) -> NoReturn:
        """Rows have no masks here."""
        raise NotImplementedError

    def is_intact(self) -> bool:
        """Returns True: there are no pages to lose."""
        return True

    def reset(self) -> None:
        """Does nothing."""


@dataclass(frozen=True)
class InstantStep:
    """A step of an InstantDevice."""

    rows: list[list[RowDraws]]
    ready: float  # time.monotonic()

    def drawn(self) -> list[list[RowDraws]]:
        """Waits until the step would have ended; returns its tokens."""
        if self.ready:
            time.sleep(max(0.0, self.ready - time.monotonic()))
        return self.rows
