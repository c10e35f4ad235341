"""A run lowers the loss, and tells what it does."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.training.batch import Batch
from mixtral_jax.training.loop import Trainer, TrainingError
from mixtral_jax.training.records import (
    CheckpointRecord,
    EndRecord,
    StepRecord,
    ValidationRecord,
)
from tests.support.models import model_of
from tests.support.training import DENSE, MOE, Counting, settings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "is_full"), [(MOE, False), (DENSE, True)], ids=["moe-adapter", "dense-full"]
)
def test_a_run_lowers_the_loss(config: ModelConfig, is_full: bool) -> None:
    changes = {"adapter": None, "optimizer": "adafactor"} if is_full else {}
    run = settings(micro_batches=2, learning_rate=5e-2, **changes)
    trainer = Trainer(model_of(config), run, Counting(config, run.rows, num_steps=1))
    records = list(trainer.records())
    steps = [record for record in records if isinstance(record, StepRecord)]
    assert [record.step for record in steps] == list(range(1, 21))
    assert records[-1] == EndRecord(step=20, is_finished=True)
    assert steps[0].loss == pytest.approx(4.2, abs=0.1)  # log(67): every token is as likely
    assert steps[-1].loss < steps[0].loss - 0.1
    assert not any(record.is_skipped for record in steps)
    if config.is_moe:
        assert steps[0].expert_load.shape == (2, 3)
        assert steps[0].expert_load.sum(axis=1) == pytest.approx(1.0)


class Broken(Counting):
    """Rows of which those of some steps have targets that weigh NaN."""

    def __init__(self, bad_steps: set[int], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.bad_steps = bad_steps

    def batch(self, step: int) -> Batch:
        """The rows of a step, counted from 0."""
        batch = super().batch(step)
        return batch._replace(weights=batch.weights * np.nan) if step in self.bad_steps else batch


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    run = settings(max_skipped_steps=3, checkpoint_every=2, keep=9, validate_every=3)
    batches = Broken({1, 4, 5, 6}, DENSE, run.rows)
    validation = [Counting(DENSE, run.rows).batch(100)]
    trainer = Trainer(
        model_of(DENSE), run, batches, folder=tmp_path, facts={"data": "a"}, validation=validation
    )
    records: list[Any] = []
    before: list[Any] = []
    with pytest.raises(TrainingError, match="in 3 steps in a row, up to step 7"):
        for record in trainer.records():
            if isinstance(record, StepRecord):
                now = jax.device_get(trainer.trained)
                same = before and all(
                    map(np.array_equal, jax.tree.leaves(now), jax.tree.leaves(before[-1]))
                )
                assert bool(same) == record.is_skipped
                assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(now))
                before.append(now)
            records.append(record)
    steps = [record for record in records if isinstance(record, StepRecord)]
    assert [record.step for record in steps if record.is_skipped] == [2, 5, 6, 7]
    assert [record.skipped for record in steps] == [0, 1, 1, 1, 2, 3, 4]
    saved = [record.step for record in records if isinstance(record, CheckpointRecord)]
    assert saved == [2, 4, 6]
    seen = [record.step for record in records if isinstance(record, ValidationRecord)]
    assert seen == [3, 6]
    # The rows are the same in the next run, which begins where the last one was saved.
    again = Trainer(model_of(DENSE), run, batches, folder=tmp_path, facts={"data": "a"})
    assert again.resumed_from == 6 and int(again.state.skipped) == 3
