"""Settings of a run check themselves, and go through JSON."""

from typing import Any

import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.training.config import TrainingConfig

DENSE = ModelConfig.smollm2_135m()
MOE = ModelConfig.tiny(vocab_size=67)


def test_settings_survive_json() -> None:
    plain = TrainingConfig(steps=3, adapter=AdapterConfig(targets=("q", "up"), rank=4))
    assert TrainingConfig.from_json(plain.to_json()) == plain
    full = TrainingConfig(epochs=1.5, adapter=None)
    assert TrainingConfig.from_json(full.to_json()) == full


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": None}, "either steps or epochs"),
        ({"epochs": 2.0}, "either steps or epochs"),
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"rows": 8, "micro_batches": 3}, "choose a divisor of 8"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a number above 0"),
        ({"schedule": "exponential"}, "schedule='exponential' does not exist; use cosine"),
        ({"warmup_steps": 10}, "leaves no step of 10"),
        ({"beta2": 1.0}, "beta2=1.0 must be from 0 and below 1"),
        ({"length": 1}, "no token to predict"),
        ({"objective": "preference", "adapter": None}, "give an adapter"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainingConfig(**{"steps": 10, **changes})


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ConfigError, match="'learning_rat' is no setting"):
        TrainingConfig.from_json({"learning_rat": 1, "steps": 3})
    with pytest.raises(ConfigError, match="'dropout' is no setting"):
        TrainingConfig.from_json({"adapter": {"dropout": 0.1}, "steps": 3})


def test_settings_that_a_model_cannot_be_trained_with() -> None:
    with pytest.raises(ConfigError, match="weights are int8"):
        TrainingConfig(steps=3, adapter=None).check(DENSE, "int8")
    with pytest.raises(ConfigError, match="the weights are fp8"):
        TrainingConfig(steps=3, adapter=None).check(DENSE, "fp8")
    with pytest.raises(ConfigError, match="no routers"):
        TrainingConfig(steps=3, router_z_coefficient=0.1).check(DENSE, "float32")
    with pytest.raises(ConfigError, match="more than the 8192 positions"):
        TrainingConfig(steps=3, length=8193).check(DENSE, "float32")


def test_routers_that_are_trained_are_balanced() -> None:
    plain = TrainingConfig(steps=3)
    assert plain.aux_coefficient(MOE) == 0
    assert TrainingConfig(steps=3, adapter=None).aux_coefficient(MOE) == 0.001
    assert TrainingConfig(steps=3, adapter=None).aux_coefficient(DENSE) == 0
    routed = TrainingConfig(steps=3, adapter=AdapterConfig(targets=("router",)))
    assert routed.aux_coefficient(MOE) == 0.001


def test_epochs_become_steps() -> None:
    run = TrainingConfig(epochs=2.5).resolved(3)
    assert (run.steps, run.epochs) == (8, None)
