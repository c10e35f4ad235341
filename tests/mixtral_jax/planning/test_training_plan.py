"""The plan of a training step: its bytes on devices, against arithmetic."""

from dataclasses import replace

import jax
import pytest

from mixtral_jax.errors import ConfigError
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.planning.compiler_process import CompileError
from mixtral_jax.planning.training_plan import (
    TrainingJob,
    TrainingPlan,
    compile_training,
    plan_training,
)
from mixtral_jax.training.config import TrainingConfig
from tests.support.plan_workload import DENSE

RUN = TrainingConfig(adapter=AdapterConfig(rank=4), steps=10, rows=4, length=64)
MESH = "data=2,expert=1,tensor=1"
JOB = TrainingJob(
    model=replace(DENSE, num_layers=2),
    dtype="float32",
    topology="cpu:2",
    mesh=MESH,
    training=RUN,
)


def test_a_job_and_a_plan_survive_json() -> None:
    assert TrainingJob.from_json(JOB.to_json()) == JOB
    mixed = replace(JOB, dtype="int4", weight_dtypes=(("layers.0.attention.v", "int8"),))
    assert TrainingJob.from_json(mixed.to_json()) == mixed
    full = replace(JOB, training=replace(RUN, adapter=None), whole=True)
    assert TrainingJob.from_json(full.to_json()) == full


@pytest.mark.soak  # compiles three steps
def test_layers_that_are_not_compiled_are_extrapolated() -> None:
    """Bytes of weights are known: a layer has as many as the one before."""
    devices = jax.devices("cpu")[:2]
    deep = replace(JOB, model=replace(DENSE, num_layers=6), whole=False)
    plan = compile_training(deep, devices)
    assert plan.method == "compiled with 2 and 4 of 6 layers, and extrapolated"
    model = deep.model
    size, heads = model.hidden_size, model.num_heads * model.head_size
    keys = model.num_kv_heads * model.head_size
    layer = size * (2 * heads + 2 * keys + 3 * model.feed_forward_size + 2)
    weights = 6 * layer + size * (2 * model.vocab_size + 1)
    assert plan.memory.frozen_bytes == 4 * weights
    rank = 4
    attention = 2 * (size + heads) + 2 * (size + keys)
    # Over two devices.
    adapter = 6 * rank * (attention + 3 * (size + model.feed_forward_size)) // 2
    counters = plan.memory.state_bytes - 3 * 4 * adapter
    assert 0 < counters <= 64
    assert plan.layer is not None
    assert plan.layer.residual_bytes == 2 * 64 * size * 4
    assert plan.layer.gradient_bytes == 4 * adapter // 6
    assert TrainingPlan.from_json(plan.to_json()) == plan


@pytest.mark.slow  # compiles a step in a process of its own
def test_the_process_compiles_what_is_asked_for() -> None:
    plan = plan_training(JOB)
    assert (plan.method, plan.topology, plan.layer) == ("compiled", "cpu:2", None)
    assert plan.fits


def test_a_mesh_of_other_devices_is_refused() -> None:
    with pytest.raises(ConfigError, match="is for 4 devices, and cpu:2 has 2"):
        plan_training(replace(JOB, mesh="data=4,expert=1,tensor=1"))
    with pytest.raises(ConfigError, match="several sizes; give one, such as tpu:v5e:1x1"):
        plan_training(replace(JOB, topology="tpu:v5e"))


@pytest.mark.slow  # starts a process
def test_settings_that_do_not_fit_the_model_are_an_error() -> None:
    with pytest.raises(CompileError, match="3 rows of a micro-batch cannot be split over 2"):
        plan_training(replace(JOB, training=replace(RUN, rows=3)))
