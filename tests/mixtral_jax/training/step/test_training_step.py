"""The gradient of a step is one, whatever the micro-batches and devices it is computed by."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.training.step.program import placed
from mixtral_jax.training.step.trainee import Trainee
from mixtral_jax.training.step.training_step import TrainingStep
from tests.support.models import model_of, split_over
from tests.support.training import Counting, settings

MIXTURE = replace(ModelConfig.tiny(vocab_size=64), sliding_window=5)
ROUTED = AdapterConfig(targets=("q", "router", "gate", "down"), rank=2)


def gradient_of(model: Transformer, adapter: AdapterConfig | None, micro_batches: int) -> Any:
    """The gradient of 8 rows and the metrics' sums, as arrays of the host."""
    run = settings(
        adapter=adapter,
        rows=8,
        micro_batches=micro_batches,
        router_aux_coefficient=0.5,
        router_z_coefficient=0.1,
        recompute=False,
    )
    trainee = Trainee(model, adapter)
    step = TrainingStep(trainee, run)
    trained = trainee.initial(model, jax.random.key(0))
    if adapter is not None:  # a new one's B is zero, which would hide the gradient of A
        trained = jax.tree.map(lambda x: x + 0.01, trained)
    batch = placed(Counting(model.config, 8).batch(0), model.layout)
    gradient, sums = jax.jit(step.gradient)(trained, trainee.frozen(model), batch)
    return jax.tree.map(np.asarray, (gradient, sums))


def difference(got: Any, want: Any) -> float:
    """The largest norm of a difference, relative to that of the array."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    # An array of zeros, such as the sums of another objective, must be zeros in both.
    return max(float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1)) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(ROUTED, id="adapter"),
        pytest.param(None, id="full", marks=pytest.mark.soak),
    ],
)
def test_micro_batches_and_devices_do_not_change_the_gradient(
    adapter: AdapterConfig | None,
) -> None:
    model = model_of(MIXTURE)
    want = gradient_of(model, adapter, 1)
    for micro_batches in (2, 8):
        assert difference(gradient_of(model, adapter, micro_batches), want) < 1e-6
    for mesh, micro_batches in (("data=8", 1), ("data=2,expert=2,tensor=2", 2)):
        split = split_over(model, model_of(MIXTURE, mesh=mesh).layout.mesh)  # type: ignore[union-attr]
        assert difference(gradient_of(split, adapter, micro_batches), want) < 1e-6
