"""A device that draws what a test has written, as far as the masks allow it."""

from collections.abc import Callable, Sequence

import numpy as np

from serving.engine.device import Masks
from serving.scheduling.request import Drawn, RowDraws
from serving.scheduling.step_plan import Limits
from tests.support.scripted_device import ScriptedDevice, ScriptedStep, ScriptedWalk


class WritingDevice(ScriptedDevice):
    """Draws the next token of an answer that is written for the row's prompt.

    Where the mask of the row does not allow that token, it draws the lowest id that is allowed: a
    model that wants something else at that place.

    Args:
        limits: those of the engine.
        write: the ids of the answer to a prompt, the one that ends it included.
    """

    def __init__(self, limits: Limits, write: Callable[[Sequence[int]], Sequence[int]]) -> None:
        super().__init__(limits)
        self._write_answer = write
        self.num_drawn = 0
        self.num_masked = 0  # of these, by a row that had a mask
        self.num_refused = 0  # of these, where the mask did not allow what was written

    def _draw(self, walked: ScriptedWalk, masks: Masks | None) -> ScriptedStep:
        drawn: list[RowDraws] = []
        rows = None if masks is None else masks.allowed[0]
        for i, (chunk, tokens) in enumerate(zip(walked.plan.chunks, walked.read, strict=True)):
            if tokens is None:
                drawn.append(None)
                continue
            answer = self._write_answer(tokens[: chunk.prompt_length])
            place = min(len(tokens) - chunk.prompt_length, len(answer) - 1)
            drawn.append(
                Drawn(token_id=self._choose(answer[place], None if rows is None else rows[i]))
            )
        self._drawn = [row.token_id if isinstance(row, Drawn) else None for row in drawn]
        self.plans.append(walked.plan)
        self.masks.append(masks)
        return ScriptedStep(self, drawn, walked)

    def _choose(self, wanted: int, row: np.ndarray | None) -> int:
        self.num_drawn += 1
        if row is None:
            return wanted
        bits = np.unpackbits(np.ascontiguousarray(row).view(np.uint8), bitorder="little")
        is_free = bool(bits.all())
        self.num_masked += not is_free
        if bits[wanted]:
            return wanted
        self.num_refused += 1
        return int(np.flatnonzero(bits)[0])
