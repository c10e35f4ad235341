"""`train --plan`: the job that settings make, without data, output or weights."""

import pytest

from mixtral_jax.cli.train.plan import check_plan_flags, job_of
from mixtral_jax.errors import ConfigError, UserError
from mixtral_jax.planning.training_plan import TrainingJob


def job(**flags: object) -> TrainingJob:
    given = {"model": "mistral-7b-v0.3", **flags}
    return job_of(None, given, [], is_full=False, topology="tpu:v5e:2x4", is_whole=False)[1]


def test_a_published_model_needs_no_data() -> None:
    made = job(rows=16, dtype="int8", mesh="data=8,expert=1,tensor=1", rank=8)
    assert (made.model.num_layers, made.dtype, made.mesh) == (
        32,
        "int8",
        "data=8,expert=1,tensor=1",
    )
    assert made.training.adapter is not None
    assert (made.training.rows, made.training.adapter.rank) == (16, 8)
    # The plan compiles a step, whose run has some length.
    assert (made.training.steps, made.training.epochs) == (1000, None)
    assert job(steps=7).training.steps == 7
    assert job().dtype == "bfloat16"


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="no model is known as 'mistral-9b'"):
        job(model="mistral-9b")


def test_flags_of_a_plan_need_each_other() -> None:
    with pytest.raises(UserError, match="--plan needs --topology"):
        check_plan_flags(True, None, False, False)
    with pytest.raises(UserError, match="--whole is for --plan"):
        check_plan_flags(False, None, True, False)
    with pytest.raises(UserError, match="--topology is for --plan"):
        check_plan_flags(False, "tpu:v5e:2x4", False, False)
    check_plan_flags(True, "tpu:v5e:2x4", True, True)
