"""Arithmetic of a step, against figures worked out by hand."""

import pytest

from mixtral_jax.planning.plan import Plan, best_first
from mixtral_jax.planning.search import known_model
from mixtral_jax.roofline.chips import GIB, topologies
from mixtral_jax.roofline.estimate import Estimate
from mixtral_jax.roofline.split import Split
from tests.support.plan_workload import SMALL, plan_of, workload_of

MIXTRAL = known_model("mistralai/Mixtral-8x7B-Instruct-v0.1")
EXPERT = 3 * 4096 * 14336 * 2  # bytes of one expert of one layer in bfloat16


def test_weights_and_pages_of_mixtral_by_hand() -> None:
    workload = workload_of(MIXTRAL, "int8", batch=32, context=2048, page_size=128)
    plan = plan_of(workload, "tpu:v5e:2x4", (1, 8, 1))
    d, f, kv, vocab = 4096, 14336, 1024, 32000
    attention = (2 * d * d + 2 * d * kv) + 4 * (2 * d + 2 * kv)  # and a scale for each output
    expert = 3 * d * f + 4 * (2 * f + d)
    norms_and_router = 2 * (2 * d + 8 * d)
    # All experts, heads and rows of the vocabulary in eighths, but for o's scales.
    layer = (attention - 4 * d) / 8 + 4 * d + expert + norms_and_router
    ends = 2 * (vocab * d + 4 * vocab) / 8 + 2 * d
    assert plan.weight_bytes == 32 * layer + ends
    assert plan.cache_bytes == 32 * 2048 * 131_072 / 8
    assert plan.fits
    assert plan.decode.bound == "memory"
    # All eight are touched, as 32 tokens choose two each.
    assert plan.least_bytes == pytest.approx(plan.weight_bytes + plan.cache_bytes, rel=0.02)


def test_few_tokens_touch_few_experts() -> None:
    alone, many = (
        plan_of(workload_of(SMALL, batch=batch, context=16), "cpu:1", (1, 1, 1)).least_bytes
        for batch in (1, 64)
    )
    experts = 3 * 3 * 8 * 256 * 896 * 4
    page = 16 * 3 * 2 * 8 * 16 * 4
    row = 2 * 3 * 256 * 4
    assert many - alone == pytest.approx(0.75 * experts + 63 * (page + row), rel=1e-6)


def lone_request(topology: str, shape: tuple[int, int, int]) -> Plan:
    return plan_of(workload_of(MIXTRAL, "bfloat16", batch=1, page_size=16), topology, shape)


@pytest.mark.parametrize("topology", ["tpu:v5e:2x4", "cpu:8"])
def test_a_lone_request_needs_a_whole_expert_of_the_busiest_chip(topology: str) -> None:
    """Split by experts, two chips need all of their one expert and six need nothing.

    Split by tensors, every chip needs an eighth of two experts: three quarters of an expert less.
    All other bytes are the same.
    """
    by_experts, by_tensors = (
        lone_request(topology, shape).least_bytes for shape in ((1, 8, 1), (1, 1, 8))
    )
    assert by_experts - by_tensors == 32 * EXPERT * 0.75


def test_on_cpu_a_lone_request_is_slower_split_by_experts() -> None:
    """Kernels of the CPU read the experts that were chosen, and no others."""
    by_experts, by_tensors = (lone_request("cpu:8", shape) for shape in ((1, 8, 1), (1, 1, 8)))
    bandwidth = by_experts.topology.chip.bandwidth
    seconds = by_experts.decode.memory - by_tensors.decode.memory
    assert seconds == pytest.approx(32 * EXPERT * 0.75 / bandwidth)
    assert by_experts.decode.total > by_tensors.decode.total


def test_an_accelerator_computes_every_expert_for_few_tokens() -> None:
    """The dense form of few tokens reads each chip's experts whole: one, or eight eighths.

    So both splits take the same time, of which one could be spared: 14.26 ms of v5e's 819 GB/s
    for the 10.88 GiB that a chip holds.
    """
    by_experts, by_tensors = (
        lone_request("tpu:v5e:2x4", shape) for shape in ((1, 8, 1), (1, 1, 8))
    )
    assert by_experts.decode_bytes == by_tensors.decode_bytes == by_experts.least_bytes
    assert by_experts.decode.memory * 1e3 == pytest.approx(14.26, abs=0.05)
    assert by_tensors.decode_bytes - by_tensors.least_bytes == 32 * EXPERT * 0.75
    # Two eighths of an expert in each layer, and the rest, would be less than 3 GiB.
    assert by_tensors.least_bytes / GIB == pytest.approx(2.975, abs=0.001)
    # At equal times the split that leaves more to gain is preferred.
    assert best_first([by_experts, by_tensors])[0] is by_tensors
    assert by_tensors.decode_bytes / by_tensors.least_bytes == pytest.approx(3.62, abs=0.1)


def test_many_tokens_need_every_expert_of_every_split() -> None:
    """Beyond the dense form of few tokens, 200 tokens choose all eight experts."""
    (topology,) = topologies("tpu:v5e:2x4")
    workload = workload_of(MIXTRAL, "bfloat16", batch=200)
    for shape in ((1, 8, 1), (1, 4, 2), (1, 1, 8)):
        estimate = Estimate(workload=workload, topology=topology, split=Split.of(MIXTRAL, *shape))
        assert not estimate.computes_every_expert(200)
        assert estimate.chosen_share(200) == pytest.approx(1)
