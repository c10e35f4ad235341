"""Records: what a run tells while it goes on. The command logs them; `str` gives a line of text."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimiser step.

    Attributes:
        step: number of the step, from 1.
        loss: mean loss over the targets' weights, without the routers' losses.
        tokens: positions that are no padding.
        targets: sum of the targets' weights; the number of pairs for "preference".
        seconds: time of the step.
        gradient_norm: global, before clipping.
        learning_rate: of this step.
        aux: load balancing loss of the routers; X is balanced. 0 in a dense model.
        z: mean square of the routers' log-normalisers.
        expert_load: [L E], each expert's share of its layer's picks; [0 0] in a dense model.
        accuracy: of "preference", share of pairs whose preferred answer gained more.
        margin: of "preference", mean of beta times the difference of log-ratios.
        is_skipped: the loss or the gradient was not finite, and nothing was changed.
        skipped: number of skipped steps so far.
    """

    step: int
    loss: float
    tokens: int
    targets: float
    seconds: float
    gradient_norm: float
    learning_rate: float
    aux: float
    z: float
    expert_load: np.ndarray
    accuracy: float
    margin: float
    is_skipped: bool
    skipped: int

    def __str__(self) -> str:
        result = "skipped, as it is not finite" if self.is_skipped else f"loss {self.loss:.3f}"
        return f"step {self.step}: {result}, {self.seconds:.1f} s"


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """The mean loss of the validation rows after a step; the rest is as in StepRecord."""

    step: int
    loss: float
    targets: float
    seconds: float
    accuracy: float = 0.0
    margin: float = 0.0

    def __str__(self) -> str:
        return f"step {self.step}: validation loss {self.loss:.3f}, {self.seconds:.1f} s"


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """The model's answer to a row after a step, beside the one that is expected; texts."""

    step: int
    asked: str
    expected: str
    answered: str


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """A checkpoint after a step; it is complete when the next one begins, or the run ends."""

    step: int
    seconds: float  # that the run has waited for it

    def __str__(self) -> str:
        return f"step {self.step}: checkpoint"


@dataclass(frozen=True, kw_only=True)
class EndRecord:
    """The end of a run: all steps are done, or it was told to stop after the one that ran."""

    step: int
    is_finished: bool

    def __str__(self) -> str:
        return f"step {self.step}: {'the run is finished' if self.is_finished else 'stopped'}"


Record = StepRecord | ValidationRecord | SampleRecord | CheckpointRecord | EndRecord
