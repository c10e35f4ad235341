"""What fits, and the order of plans."""

from dataclasses import replace

import pytest

from mixtral_jax.planning.plan import best_first, plan_by_arithmetic
from mixtral_jax.planning.search import known_model
from mixtral_jax.roofline.chips import topologies
from mixtral_jax.roofline.split import Split, candidates
from mixtral_jax.roofline.step_seconds import EstimatedSeconds
from tests.support.plan_workload import SMALL, plan_of, workload_of

MIXTRAL = known_model("mixtral-8x7b-v0.1")


def test_a_window_frees_memory_for_the_whole_context() -> None:
    config = known_model("mistral-7b-instruct-v0.1")
    workload = workload_of(config, "bfloat16", batch=1, context=32_768)
    assert plan_of(workload, "gpu:h100:1", (1, 1, 1)).longest_context == 32_768


def test_longest_context_and_largest_batch_are_what_still_fits() -> None:
    def plan(batch: int, context: int) -> bool:
        workload = workload_of(MIXTRAL, "int8", batch=batch, context=context)
        return plan_of(workload, "tpu:v5e:2x4", (1, 8, 1)).fits

    workload = workload_of(MIXTRAL, "int8", batch=32, context=2048)
    limits = plan_of(workload, "tpu:v5e:2x4", (1, 8, 1))
    assert plan(32, limits.longest_context)
    assert not plan(32, limits.longest_context + 64)
    assert plan(limits.largest_batch, 2048)
    assert not plan(limits.largest_batch + 2, 2048)


@pytest.mark.parametrize(
    ("memory", "compute", "network", "total", "bound"),
    [
        (3.0, 2.0, 1.0, 4.0, "memory"),
        (2.0, 3.0, 1.0, 4.0, "compute"),
        (1.0, 2.0, 5.0, 7.0, "network"),
    ],
)
def test_a_step_waits_for_the_slower_of_memory_and_compute_and_then_for_the_network(
    memory: float, compute: float, network: float, total: float, bound: str
) -> None:
    seconds = EstimatedSeconds(memory=memory, compute=compute, network=network)
    assert (seconds.total, seconds.bound) == (total, bound)


def test_plans_that_fit_come_first_then_fast_then_small_ones() -> None:
    (topology,) = topologies("cpu:8")
    chip = replace(topology.chip, memory=1000)
    plan = plan_by_arithmetic(
        workload_of(SMALL), replace(topology, chip=chip), Split.of(SMALL, 1, 8, 1)
    )

    def made(nbytes: int, seconds: float, least: float = 1.0) -> object:
        return replace(
            plan,
            weight_bytes=nbytes,
            cache_bytes=0,
            temporary_bytes=0,
            least_bytes=least,
            decode=EstimatedSeconds(memory=seconds, compute=0.0, network=0.0),
        )

    fast, slow, wasteful = made(900, 1.0), made(100, 2.0), made(100, 2.0, least=2.0)
    large, larger = made(1001, 0.2), made(1002, 0.1)
    assert best_first([larger, wasteful, large, slow, fast]) == [  # type: ignore[list-item]
        fast,
        slow,
        wasteful,
        large,
        larger,
    ]


def test_mixtral_in_int8_on_eight_small_tpus_is_split_so_that_it_fits() -> None:
    """On v5e:2x4 the whole model, 47 GB, fits in eighths of 6 GB, and in no part of a quarter."""
    (topology,) = topologies("tpu:v5e:2x4")
    workload = workload_of(MIXTRAL, "int8", batch=32, context=2048, page_size=128)
    splits = candidates(MIXTRAL, 32, 8)
    best, *others = best_first([plan_by_arithmetic(workload, topology, s) for s in splits])
    assert best.fits
    assert best.split.data == 1
    assert {plan.split.data for plan in others if not plan.fits} >= {4, 8}
