"""The loop: step after step over the data, told as records, with checkpoints to go on from."""

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixtral_jax.errors import UserError
from mixtral_jax.model.adapter import Adapter
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.training.batch import Batch, PreferenceBatch
from mixtral_jax.training.checkpoints import Checkpoints
from mixtral_jax.training.config import CHANGEABLE, TrainingConfig
from mixtral_jax.training.records import (
    CheckpointRecord,
    EndRecord,
    Record,
    SampleRecord,
    StepRecord,
    ValidationRecord,
)
from mixtral_jax.training.samples import Samples
from mixtral_jax.training.step.program import TrainingProgram
from mixtral_jax.training.step.training_step import StepMetrics, TrainingState


class TrainingError(UserError):
    """A run that cannot go on; the message says why and what helps."""


@runtime_checkable
class Batches(Protocol):
    """The rows of each step: a function of the step's number."""

    def batch(self, step: int) -> Batch | PreferenceBatch:
        """All rows of a step, counted from 0: a Batch, or a PreferenceBatch for "preference"."""


class Trainer:
    """A training run: compiled when it is made, and run by `records`.

        trainer = Trainer(model, config, batches, folder=Path("run/checkpoints"))
        for record in trainer.records():
            print(record)
        adapter = trainer.trained

    Where the folder has a checkpoint the run goes on from the last one, as if it had not ended.
    Every process of a group makes a Trainer of the same arguments, and runs it to its end.

    Args:
        model: the model to train. In full fine-tuning drop it then: the run has copies.
        config: settings, in which `steps` is known.
        batches: rows of the steps.
        folder: place of the checkpoints; None makes none.
        facts: what else the run is, such as digests of its data and its model. A run goes on only
            from checkpoints of the same facts and settings.
        validation: rows of which the loss is told every `validate_every` steps, in batches of one
            shape.
        samples: questions that the model answers after each validation, with the adapter as it is
            then. In full fine-tuning there are none: their model would be one more copy in memory.

    Raises ConfigError for a model or devices that do not fit the settings, and for checkpoints of
    another run; CheckpointError for damaged ones.
    """

    def __init__(
        self,
        model: Transformer,
        config: TrainingConfig,
        batches: Batches,
        *,
        folder: Path | None = None,
        facts: Mapping[str, str] | None = None,
        validation: Sequence[Batch | PreferenceBatch] = (),
        samples: Samples | None = None,
    ) -> None:
        assert config.steps is not None, "epochs are not resolved yet"
        self.config, self.batches, self.validation = config, batches, validation
        self.num_steps = config.steps
        self.program = TrainingProgram(model, config)
        self._checkpoints: Checkpoints | None = None
        if folder is not None:
            what = {
                **config.to_json(),
                "model": model.config.to_json(),
                "dtype": model.placement.dtype,
                **(facts or {}),
            }
            self._checkpoints = Checkpoints(folder, config.keep, what, CHANGEABLE)
        self._frozen = self.program.frozen(model)
        self._model = None if samples is None or config.adapter is None else model
        self._samples = samples
        if self._checkpoints is not None and self._checkpoints.latest is not None:
            self._state = self._checkpoints.restore(self.program.abstract_state())
        else:
            self._state = self.program.start(model, jax.random.key(config.seed))
        self.step = int(self._state.step)
        self.resumed_from = self.step
        self._is_stopped = False

    @property
    def state(self) -> TrainingState:
        """The state after the last step; a step that follows uses its arrays up."""
        return self._state

    @property
    def trained(self) -> Any:
        """The trained arrays: an Adapter without its scaling, or the masters by their names."""
        return self._state.trained

    @property
    def adapter(self) -> Adapter:
        """The adapter as it is now, with its scaling in B, whole on every device.

        There is none in full fine-tuning.
        """
        assert self.config.adapter is not None and isinstance(self.trained, Adapter)
        return self.program.trainee.whole(self.trained).folded(self.config.adapter)

    def stop(self) -> None:
        """Ends the run after the step that runs now, with a checkpoint; any thread may call it."""
        self._is_stopped = True

    def records(self) -> Generator[Record]:
        """Runs the steps that are not done yet; the last state is saved at the end.

        Raises TrainingError after `max_skipped_steps` steps in a row that were not finite.
        """
        config = self.config
        try:
            is_stopped = self._is_stopped_anywhere()
            while self.step < self.num_steps and not is_stopped:
                yield self._run_step()
                self._check_skipped()
                is_stopped = self._is_stopped_anywhere()
                if self.validation and self._is_due(config.validate_every):
                    yield self._validate()
                    yield from self._answers()
                is_due = self._is_due(config.checkpoint_every) or is_stopped
                if self._checkpoints and is_due:
                    yield self._save(self._checkpoints)
        finally:
            if self._checkpoints is not None:
                self._checkpoints.close()
        yield EndRecord(step=self.step, is_finished=self.step == self.num_steps)

    def _is_due(self, interval: int) -> bool:
        """True every `interval` steps and after the last; never for an interval of 0."""
        return interval > 0 and (self.step % interval == 0 or self.step == self.num_steps)

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
            accuracy=float(metrics.accuracy),
            margin=float(metrics.margin),
            is_skipped=not metrics.is_finite,
            skipped=int(self._state.skipped),
        )

    def _validate(self) -> ValidationRecord:
        began = time.perf_counter()
        sums = [
            self.program.evaluate(self._state.trained, self._frozen, batch)
            for batch in self.validation
        ]
        loss, targets, preferred, margin = (
            math.fsum(map(float, column)) for column in zip(*sums, strict=True)
        )
        return ValidationRecord(
            step=self.step,
            loss=loss / targets,
            targets=targets,
            seconds=time.perf_counter() - began,
            accuracy=preferred / targets,
            margin=margin / targets,
        )

    def _answers(self) -> Iterator[SampleRecord]:
        if self._model is None or self._samples is None:
            return
        answers = self._samples.answers(self._model, self.adapter)
        for (asked, expected), answered in zip(self._samples.texts(), answers, strict=True):
            yield SampleRecord(step=self.step, asked=asked, expected=expected, answered=answered)

    def _save(self, checkpoints: Checkpoints) -> CheckpointRecord:
        began = time.perf_counter()
        checkpoints.save(self._state, self.step)
        return CheckpointRecord(step=self.step, seconds=time.perf_counter() - began)

    def _check_skipped(self) -> None:
        in_a_row = int(self._state.skipped_in_a_row)
        if in_a_row >= self.config.max_skipped_steps:
            raise TrainingError(
                f"the loss or the gradient was not finite in {in_a_row} steps in a row, up to step "
                f"{self.step}; give a smaller learning rate, or look at the rows of these steps"
            )

    def _is_stopped_anywhere(self) -> bool:
        """True in all processes of a group at the same step, if any of them was told to stop."""
        if jax.process_count() == 1:
            return self._is_stopped
        flags = multihost_utils.process_allgather(np.array(self._is_stopped))
        return bool(np.any(flags))
