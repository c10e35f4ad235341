"""Compiles a whole decode step in a process whose jax has the chips."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mixtral_jax.config import ModelConfig
from mixtral_jax.planning.compiler import CompileJob, abstract_model, compile_step
from mixtral_jax.planning.compiler_process import answer_job
from mixtral_jax.planning.topology import absent_devices
from mixtral_jax.planning.traffic import program_traffic
from mixtral_jax.roofline.chips import topologies
from mixtral_jax.sharding import mesh_sizes
from mixtral_jax.step.inputs import StepSizes
from mixtral_jax.step.split_model import SplitModel
from mixtral_jax.step.whole_step import Kind, WholeSteps


def compiled(fields: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Compiles the whole step, and the layers that `plan` compiles, and compares them."""
    job = CompileJob(**{**fields, "model": ModelConfig.from_json(fields["model"])})
    (topology,) = topologies(job.topology)
    devices: Sequence[jax.Device] = absent_devices(topology)
    model = abstract_model(job, devices)
    split = SplitModel.of(model)
    sizes = StepSizes(
        num_pages=job.num_pages,
        page_size=job.page_size,
        max_sequences=job.sequences,
        max_context=job.context,
    )
    pages = split.pages(job.num_pages, job.page_size, None)
    groups = None if model.layout is None else split.num_sequence_groups
    whole = WholeSteps(split, pages, sizes, groups, {job.sequences: job.sequences})
    progress("tracing")
    begun = time.monotonic()
    lowered = whole.lowered((Kind(), job.sequences))
    traced = time.monotonic()
    progress("compiling")
    program = lowered.compile()
    ended = time.monotonic()
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None and text is not None
    experts = job.model.num_experts // mesh_sizes(job.mesh)[1] if job.model.is_moe else 0
    traffic = program_traffic(text, job.decode_reads, experts)
    by_layers = compile_step(job, devices, progress).decode
    layers = job.model.num_layers
    planned = Counter(item.kind for item in by_layers.outer_collectives)
    for item in by_layers.layer_collectives:
        planned[item.kind] += layers
    held = pages.shape if pages.sharding is None else pages.sharding.shard_shape(pages.shape)
    return {
        "trace": traced - begun,
        "compile": ended - traced,
        "program": memory.generated_code_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "pages": layers * math.prod(held) * pages.dtype.itemsize,
        "temporaries": memory.temp_size_in_bytes,
        "entries": text.count("\nENTRY "),
        "moved": traffic.nbytes,
        "moved_by_layers": by_layers.moved_bytes,
        "collectives": dict(Counter(item.kind for item in traffic.collectives)),
        "planned": dict(planned),
        "kernels": dict(traffic.kernels),
    }


if __name__ == "__main__":
    answer_job(compiled)
