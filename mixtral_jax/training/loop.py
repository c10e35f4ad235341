"""The loop: step after step over the data, told as records."""

import time
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from mixtral_jax.errors import UserError
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.training.batch import Batch
from mixtral_jax.training.config import TrainingConfig
from mixtral_jax.training.records import EndRecord, Record, StepRecord
from mixtral_jax.training.step.program import TrainingProgram
from mixtral_jax.training.step.training_step import StepMetrics, TrainingState


class TrainingError(UserError):
    """A run that cannot go on; the message says why and what helps."""


@runtime_checkable
class Batches(Protocol):
    """The rows of each step: a function of the step's number."""

    def batch(self, step: int) -> Batch:
        """All rows of a step, counted from 0."""


class Trainer:
    """A training run: compiled when it is made, and run by `records`.

        trainer = Trainer(model, config, batches)
        for record in trainer.records():
            print(record)
        adapter = trainer.trained

    Args:
        model: the model to train. In full fine-tuning drop it then: the run has copies.
        config: settings, in which `steps` is known.
        batches: rows of the steps.

    Raises ConfigError for a model or devices that do not fit the settings.
    """

    def __init__(self, model: Transformer, config: TrainingConfig, batches: Batches) -> None:
        assert config.steps is not None, "epochs are not resolved yet"
        self.config, self.batches = config, batches
        self.num_steps = config.steps
        self.program = TrainingProgram(model, config)
        self._state, self._frozen = self.program.start(model, jax.random.key(config.seed))
        self.step = 0
        self._is_stopped = False

    @property
    def state(self) -> TrainingState:
        """The state after the last step; a step that follows uses its arrays up."""
        return self._state

    @property
    def trained(self) -> Any:
        """The trained arrays: an Adapter without its scaling, or the masters by their names."""
        return self._state.trained

    def stop(self) -> None:
        """Ends the run after the step that runs now; may be called by a signal's handler."""
        self._is_stopped = True

    def records(self) -> Iterator[Record]:
        """Runs the steps that are not done yet.

        Raises TrainingError after `max_skipped_steps` steps in a row that were not finite.
        """
        while self.step < self.num_steps and not self._is_stopped:
            record = self._run_step()
            yield record
            self._check_skipped()
        yield EndRecord(step=self.step, is_finished=self.step == self.num_steps)

    def _run_step(self) -> StepRecord:
        began = time.perf_counter()
        batch = self.batches.batch(self.step)
        self._state, on_device = self.program(self._state, self._frozen, batch)
        metrics: StepMetrics = jax.tree.map(np.asarray, on_device)
        self.step += 1
        return StepRecord(
            step=self.step,
            loss=float(metrics.loss),
            tokens=int(metrics.tokens),
            targets=float(metrics.targets),
            seconds=time.perf_counter() - began,
            gradient_norm=float(metrics.gradient_norm),
            learning_rate=float(metrics.learning_rate),
            aux=float(metrics.aux),
            z=float(metrics.z),
            expert_load=np.asarray(metrics.expert_load),
            is_skipped=not metrics.is_finite,
            skipped=int(self._state.skipped),
        )

    def _check_skipped(self) -> None:
        in_a_row = int(self._state.skipped_in_a_row)
        if in_a_row >= self.config.max_skipped_steps:
            raise TrainingError(
                f"the loss or the gradient was not finite in {in_a_row} steps in a row, up to step "
                f"{self.step}; give a smaller learning rate, or look at the rows of these steps"
            )
