"""The compiler's report, against the arithmetic and against arrays that really live on devices."""

from dataclasses import replace

import jax
import pytest
from flax import nnx

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.placement import Placement
from mixtral_jax.planning.compiler import CompileJob, abstract_model, compile_in_subprocess
from mixtral_jax.planning.compiler_process import CompileError
from mixtral_jax.planning.plan import with_compiler
from mixtral_jax.step.programs import compile_empty
from mixtral_jax.step.split_model import SplitModel
from tests.support.plan_workload import DENSE, SMALL, job_on_cpu, workload_of


def bytes_on_devices(job: CompileJob) -> tuple[set[int], set[int]]:
    """Bytes of the model's parameters, and of its pages, on each of eight devices.

    Only the arrays that the model and the cache name are counted, whatever else lives.
    """
    placement = Placement.of(
        job.model, job.dtype, job.mesh, job.dp_attention, weight_dtypes=job.weight_dtypes
    )
    model = Transformer(job.model, placement, rngs=nnx.Rngs(0))
    split = SplitModel.of(model)
    empty = compile_empty(split.pages(job.num_pages, job.page_size))
    layers = [empty() for _ in split.blocks]

    def each(tree: object) -> set[int]:
        totals = dict.fromkeys(jax.devices(), 0)
        for array in jax.tree.leaves(tree):
            for shard in array.addressable_shards:
                totals[shard.device] += shard.data.nbytes
        return set(totals.values())

    return each(nnx.state(model)), each(layers)


@pytest.mark.slow  # compiles the step of eight devices
@pytest.mark.parametrize(
    ("config", "dtype", "shape", "dp_attention"),
    [
        pytest.param(SMALL, "float32", (1, 8, 1), False, marks=pytest.mark.soak),
        pytest.param(SMALL, "int8", (1, 4, 2), True, marks=pytest.mark.soak),
        (replace(DENSE, head_size=32), "int4", (2, 2, 2), True),
    ],
    ids=["experts", "int8 and sequences", "dense, of two dtypes"],
)
def test_memory_is_what_really_lives_on_devices(
    config: ModelConfig, dtype: str, shape: tuple[int, int, int], dp_attention: bool
) -> None:
    mixed = (("layers.1.attention.v", "int8"), ("layers.1.feed_forward.down", "int8"))
    workload = workload_of(config, dtype, weight_dtypes=mixed if dtype == "int4" else ())
    job, plan = job_on_cpu(workload, shape, dp_attention)
    (weights,), (pages,) = bytes_on_devices(job)  # the same on every device
    lines: list[str] = []
    report = compile_in_subprocess(job, lines.append)
    assert report.weight_bytes == pytest.approx(weights, rel=0.03)
    assert report.cache_bytes == pytest.approx(pages, rel=0.03)
    # Arithmetic knows both as well as the compiler does, on CPU, which pads nothing.
    assert (plan.weight_bytes, plan.cache_bytes) == pytest.approx((weights, pages), rel=0.03)
    compiled = with_compiler(plan, report)
    assert compiled.method == "compiled"
    assert compiled.total_bytes == (
        report.weight_bytes + report.cache_bytes + report.temporary_bytes + report.program_bytes
    )
    assert not compiled.to_json()["collectives_move_weights"]
    # The collectives that arithmetic reckons with are those of the program.
    kinds = [{item.kind for item in either.layer_collectives} for either in (compiled, plan)]
    assert kinds[0] == kinds[1]
    first = f"compiling step 1 of 2: {job.sequences} tokens"
    assert lines == [first, f"compiling step 2 of 2: {job.prefill_tokens} tokens"]


@pytest.mark.parametrize("dp_attention", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_model_is_placed_as_the_server_places_it(dtype: str, dp_attention: bool) -> None:
    """Sixteen query heads over eight devices, and eight key/value heads; equal in all fields."""
    job, _ = job_on_cpu(workload_of(SMALL, dtype), (1, 4, 2), dp_attention)
    served = Placement.of(SMALL, dtype, "data=1,expert=4,tensor=2", dp_attention)
    assert abstract_model(job, jax.devices()).placement == served


def test_key_value_heads_are_copied_as_the_server_copies_them() -> None:
    config = replace(SMALL, num_kv_heads=2)
    job, _ = job_on_cpu(workload_of(config), (1, 1, 8), False)
    placement = abstract_model(job, jax.devices()).placement
    assert placement == Placement.of(config, "float32", "tensor=8")
    assert placement.layout is not None
    assert placement.layout.mesh.shape["copy"] == 4


def test_a_program_that_cannot_be_compiled_says_why() -> None:
    job, _ = job_on_cpu(workload_of(SMALL), (1, 8, 1), False)
    with pytest.raises(CompileError, match="cannot be split 3 ways"):
        compile_in_subprocess(CompileJob(**{**vars(job), "mesh": "expert=3"}))
