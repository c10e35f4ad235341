"""A run lowers the loss, and tells what it does."""

import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.training.loop import Trainer
from mixtral_jax.training.records import EndRecord, StepRecord
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
