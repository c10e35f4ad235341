"""Arithmetic of a step, against figures worked out by hand."""

import pytest

from mixtral_jax.checkpoint.parameters import count_parameters
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


def test_bytes_of_a_model_with_weights_of_two_dtypes() -> None:
    """They are those that are stored, and by hand: int8 in place of int4 is a third of a byte more
    for each weight, and a scale for each output in place of four bytes for each group."""
    config, name = known_model("mistral-7b-v0.3"), "feed_forward.down"
    dtypes = tuple((f"layers.{i}.{name}", "int8") for i in (0, 5))
    plain, mixed = (
        plan_of(workload_of(config, "int4", weight_dtypes=own), "tpu:v5e:1x1", (1, 1, 1))
        for own in ((), dtypes)
    )
    down = 4096 * 14_336
    assert mixed.weight_bytes - plain.weight_bytes == 2 * (down // 2 + 4 * 4096 - 4 * down // 32)
    (_, nbytes), norms = count_parameters(config, "int4", dtypes), 65 * 4096
    assert mixed.weight_bytes == nbytes - 2 * norms  # norms are bfloat16 on a TPU
    assert mixed.estimate.with_batch(2).weights == mixed.estimate.weights


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


@pytest.mark.parametrize("topology", ["tpu:v5e:2x4", "gpu:h100:8"])
def test_a_lone_request_reads_the_experts_that_it_chose(topology: str) -> None:
    """Two eighths of an expert in each layer, and the rest, are 2.975 GiB of the 10.88 held.

    Split by experts, the two chips whose expert was chosen read it whole.
    """
    by_experts, by_tensors = (lone_request(topology, shape) for shape in ((1, 8, 1), (1, 1, 8)))
    assert by_tensors.decode_bytes == by_tensors.least_bytes
    assert by_tensors.decode_bytes / GIB == pytest.approx(2.975, abs=0.001)
    assert by_experts.decode_bytes - by_tensors.decode_bytes == 32 * EXPERT * 0.75
    assert best_first([by_experts, by_tensors])[0] is by_tensors


@pytest.mark.parametrize(("rows", "is_dense"), [(8, False), (16, True), (128, True), (129, False)])
def test_an_accelerator_computes_every_expert_where_nearly_all_are_chosen(
    rows: int, is_dense: bool
) -> None:
    """Eight tokens choose 0.90 of eight experts, 16 choose 0.99: a hundredth is read in vain."""
    plan = plan_of(workload_of(MIXTRAL, "bfloat16", batch=rows), "tpu:v5e:2x4", (1, 1, 8))
    assert plan.estimate.computes_every_expert(rows) == is_dense
    assert 1 <= plan.decode_bytes / plan.least_bytes < 1.02


def test_many_rows_read_an_expert_for_each_of_its_tiles_of_rows() -> None:
    """On TPU 512 tokens are 1,024 rows in two tiles, each of four experts. On GPU an expert's 64
    rows are a tile of its own, and 65 are two.
    """
    workload = workload_of(MIXTRAL, "bfloat16", batch=512)
    (tpu,), (gpu,) = topologies("tpu:v5e:2x4"), topologies("gpu:h100:8")
    split = Split.of(MIXTRAL, 1, 1, 8)
    on_tpu, on_gpu = (Estimate(workload=workload, topology=t, split=split) for t in (tpu, gpu))
    assert on_tpu.reads_of_an_expert(512) == 1
    assert on_gpu.reads_of_an_expert(256) == 1
    assert on_gpu.reads_of_an_expert(260) == 2


def test_many_tokens_need_every_expert_of_every_split() -> None:
    """Beyond the dense form of few tokens, 200 tokens choose all eight experts."""
    (topology,) = topologies("tpu:v5e:2x4")
    workload = workload_of(MIXTRAL, "bfloat16", batch=200)
    for shape in ((1, 8, 1), (1, 4, 2), (1, 1, 8)):
        estimate = Estimate(workload=workload, topology=topology, split=Split.of(MIXTRAL, *shape))
        assert not estimate.computes_every_expert(200)
        assert estimate.chosen_share(200) == pytest.approx(1)
