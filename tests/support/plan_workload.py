"""Small models and workloads to plan for."""

from dataclasses import replace
from typing import Any

from mixtral_jax.config import ModelConfig
from mixtral_jax.planning.compiler import CompileJob
from mixtral_jax.planning.plan import Plan, compile_job, plan_by_arithmetic
from mixtral_jax.roofline.chips import topologies
from mixtral_jax.roofline.split import Split
from mixtral_jax.roofline.workload import Workload

# Mixtral's proportions, so that padding does not count for more than in the real one.
SMALL = replace(
    ModelConfig.mixtral_8x7b_v01(),
    hidden_size=256,
    head_size=16,
    num_heads=16,
    feed_forward_size=896,
    num_layers=3,
    vocab_size=512,
)
DENSE = replace(SMALL, num_experts=0, experts_per_token=0)


def workload_of(config: ModelConfig, dtype: str = "float32", **changes: Any) -> Workload:
    """Eight sequences of 256 tokens, unless told otherwise."""
    sizes = {"batch": 8, "context": 256, "prefill_tokens": 64, "page_size": 16} | changes
    return Workload(model=config, dtype=dtype, kv_dtype=None, **sizes)


def plan_of(
    workload: Workload, topology: str, shape: tuple[int, int, int], dp_attention: bool = False
) -> Plan:
    """The plan by arithmetic for a topology, split into data, expert and tensor."""
    (chips,) = topologies(topology)
    return plan_by_arithmetic(workload, chips, Split.of(workload.model, *shape, dp_attention))


def job_on_cpu(
    workload: Workload, shape: tuple[int, int, int], dp_attention: bool
) -> tuple[CompileJob, Plan]:
    """The job for eight virtual devices, and the plan that it is made of."""
    plan = plan_of(workload, "cpu:8", shape, dp_attention)
    return compile_job(plan), plan
