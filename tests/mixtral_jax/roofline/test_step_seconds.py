"""The seconds of a step, and what launching it costs."""

import pytest

from mixtral_jax.planning.search import known_model
from mixtral_jax.roofline.chips import topologies
from mixtral_jax.roofline.estimate import Estimate
from mixtral_jax.roofline.split import Split
from mixtral_jax.roofline.step_seconds import EstimatedSeconds, launch_seconds
from tests.support.plan_workload import workload_of


def test_launching_takes_what_was_measured_for_392_arrays() -> None:
    """0.09 ms on one device and 0.19 ms under eight; more of them are on other hosts."""
    assert launch_seconds(392, 1) * 1e3 == pytest.approx(0.09, abs=0.001)
    assert launch_seconds(392, 8) * 1e3 == pytest.approx(0.19, abs=0.001)
    assert launch_seconds(392, 256) == launch_seconds(392, 8)


def test_devices_and_their_host_work_at_the_same_time() -> None:
    """The next step is launched while this one is computed, so only the slower of them counts."""
    large = EstimatedSeconds(memory=4.0, compute=1.0, network=1.0, launch=0.1)
    small = EstimatedSeconds(memory=0.02, compute=0.01, network=0.01, launch=0.1)
    assert (large.total, large.bound) == (5.0, "memory")
    assert (small.total, small.bound) == (0.1, "launch")


def test_a_step_is_given_each_parameter_and_the_pages_of_each_layer() -> None:
    """In a layer of Mistral: two norms, q, k, v, o, gate, up, down; scales for seven in int8."""
    model = known_model("mistral-7b-v0.3")
    (topology,) = topologies("tpu:v5e:1x1")

    def arguments(dtype: str) -> int:
        split = Split.of(model, 1, 1, 1)
        return Estimate(
            workload=workload_of(model, dtype), topology=topology, split=split
        ).num_arguments

    # Embedding, head and the last norm stand around the layers, beside eight arrays of inputs.
    assert arguments("bfloat16") == 32 * (9 + 1) + 3 + 8
    assert arguments("int8") == 32 * (9 + 7 + 1) + 5 + 8
