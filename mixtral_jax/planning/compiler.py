"""The compiler: the real serving step, compiled for chips that need not be here, and its report.

`compile_step` works in this process, whose jax must know the devices. `compile_in_subprocess`
starts a process that does (compiler_process.py).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.placement import Placement, WeightDtypes
from mixtral_jax.planning.compiler_process import answer_job, report_of
from mixtral_jax.planning.topology import target_devices
from mixtral_jax.planning.traffic import program_traffic
from mixtral_jax.roofline.chips import topologies
from mixtral_jax.roofline.collective import Collective
from mixtral_jax.sharding import mesh_sizes
from mixtral_jax.step.buckets import Steps, compile_buckets
from mixtral_jax.step.inputs import StepSizes
from mixtral_jax.step.programs import Programs


@dataclass(frozen=True, kw_only=True)
class CompileJob:
    """One serving step to compile, as plain numbers that survive JSON.

    Numbers of tokens, sequences and pages are those of one group of sequences.

    Attributes:
        model: sizes of the model.
        dtype: float32, bfloat16, int8 or fp8; the dtype of the weights.
        kv_dtype: int8, float8_e4m3fn, or None for keys and values in the activations' dtype.
        topology: the chips' name, such as tpu:v5e:2x4.
        mesh: sizes of the mesh axes as `--mesh` takes them, such as data=1,expert=8,tensor=1.
        dp_attention: sequences, not heads, are split over `expert`.
        sequences: sequences, and tokens of a decode step.
        context: tokens of one sequence.
        num_pages: pages of the cache.
        page_size: tokens of one page.
        prefill_tokens: tokens of a step that reads prompts.
        decode_reads: experts that a chip's kernel reads in a decode step over those it holds.
        prefill_reads: the same of a step of `prefill_tokens` tokens.
        weight_dtypes: of single weights, as in `Placement.of`.
    """

    model: ModelConfig
    dtype: str
    kv_dtype: str | None
    topology: str
    mesh: str
    dp_attention: bool
    sequences: int
    context: int
    num_pages: int
    page_size: int
    prefill_tokens: int
    decode_reads: float
    prefill_reads: float
    weight_dtypes: WeightDtypes = ()


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The cost of one step on one device: all its programs, a block once for each of its layers.

    Attributes:
        moved_bytes: bytes to and from memory, without reads of pages.
        flops: operations as the compiler counts them; None where it does not count.
        layer_collectives: collectives of one layer; all have the same.
        outer_collectives: collectives of the programs before and behind the layers.
        xla_bytes: the compiler's own count of bytes, of all memories of the chip.
        xla_seconds: the compiler's own estimate of the time.
        kernels: calls of kernels in the first layer, by name.
    """

    moved_bytes: float
    flops: float | None
    layer_collectives: tuple[Collective, ...]
    outer_collectives: tuple[Collective, ...]
    xla_bytes: float | None
    xla_seconds: float | None
    kernels: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class CompilerReport:
    """Bytes on one device as the compiler lays arrays out, and the costs of two steps.

    Attributes:
        weight_bytes: parameters.
        cache_bytes: pages of keys and values.
        temporary_bytes: the largest amount that exists beside them at any moment.
        program_bytes: compiled programs.
        decode: a step of one token for each sequence.
        prefill: a step of `prefill_tokens` tokens.
    """

    weight_bytes: int
    cache_bytes: int
    temporary_bytes: int
    program_bytes: int
    decode: StepCost
    prefill: StepCost

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "CompilerReport":
        """The report that `dataclasses.asdict` made these fields of."""
        costs = {}
        for step in ("decode", "prefill"):
            cost = dict(fields[step])
            for place in ("layer_collectives", "outer_collectives"):
                cost[place] = tuple(Collective(**collective) for collective in cost[place])
            costs[step] = StepCost(**cost)
        return cls(**{**fields, **costs})


def abstract_model(job: CompileJob, devices: Sequence[jax.Device]) -> Transformer:
    """The job's model on these devices, with shapes and shardings but without values.

    It is placed as the server places it, so the compiled programs are those that are served.
    """
    placement = Placement.of(
        job.model, job.dtype, job.mesh, job.dp_attention, devices, job.weight_dtypes
    )
    return Transformer(job.model, placement, rngs=None)


def compile_step(
    job: CompileJob,
    devices: Sequence[jax.Device],
    progress: Callable[[str], None] = lambda line: None,
) -> CompilerReport:
    """Compiles a decode step and a step of `prefill_tokens` tokens for these devices."""
    model = abstract_model(job, devices)
    sizes = StepSizes(
        num_pages=job.num_pages,
        page_size=job.page_size,
        max_sequences=job.sequences,
        max_context=job.context,
    )
    prefill_tokens = max(job.prefill_tokens, job.sequences)
    rows = {job.sequences: job.sequences, prefill_tokens: job.sequences}
    # Layer by layer also where the server has one program for all of them: it compiles in seconds,
    # and every layer's bytes and collectives are the same.
    steps = compile_buckets(model, sizes, rows, progress, job.kv_dtype, is_whole=False)
    return CompilerReport(
        **_memory(model, steps),
        decode=_step_cost(steps.buckets[job.sequences], job, job.decode_reads),
        prefill=_step_cost(steps.buckets[prefill_tokens], job, job.prefill_reads),
    )


def _memory(model: Transformer, steps: Steps) -> dict[str, int]:
    """Bytes of the programs' arguments as they lie in memory, of temporaries and of programs."""
    buckets = list(steps.buckets.values())
    layers = model.config.num_layers
    block = buckets[0].blocks[0]
    _, x, rotary, pages_of_block, batch = _argument_bytes(block)
    # Pages are the only arguments that a block gives back in place.
    pages = _memory_analysis(block).alias_size_in_bytes or pages_of_block
    weights = [
        _memory_analysis(form).argument_size_in_bytes - pages - x - rotary - batch
        for form in buckets[0].blocks
    ]
    distinct = {
        id(p): p for b in buckets for p in (b.embed, *b.blocks, b.pick, b.draw, _masked(b))
    }.values()
    analyses = [_memory_analysis(program) for program in distinct]
    # One program runs at a time, but those behind it have the place for their results already.
    blocks = [block for b in buckets for block in b.blocks]
    results = max(_memory_analysis(block).output_size_in_bytes for block in blocks) - pages
    inputs = max(
        sum(_argument_bytes(b.embed)[1:]) + sum(_argument_bytes(_masked(b))[1:]) for b in buckets
    )
    largest = max(analysis.temp_size_in_bytes for analysis in analyses)
    return {
        "weight_bytes": sum(weights[form] for form in buckets[0].forms)
        + _outer_weight_bytes(buckets[0]),
        "cache_bytes": layers * pages,
        "temporary_bytes": largest + layers * max(results, 0) + inputs,
        "program_bytes": sum(analysis.generated_code_size_in_bytes for analysis in analyses),
    }


def _masked(bucket: Programs) -> jax.stages.Compiled:
    """Returns the program that draws under masks, which a server compiles too."""
    assert bucket.draw_masked is not None, "the planner compiles all programs"
    return bucket.draw_masked


def _memory_analysis(program: jax.stages.Compiled) -> Any:
    """Returns the compiler's figures of a program's memory, by the names that XLA gives them."""
    figures = program.memory_analysis()
    assert figures is not None, "XLA has figures for every program that it compiled"
    return figures


def _text(program: jax.stages.Compiled) -> str:
    """Returns the program as XLA's text."""
    text = program.as_text()
    assert text is not None, "XLA has a text of every program that it compiled"
    return text


def _argument_bytes(program: Any) -> list[int]:
    """Bytes of each argument on one device; arrays that the program does not use count 0."""
    values, _ = program.args_info
    shardings, _ = program.input_shardings
    return [
        sum(_leaf_bytes(value, sharding)) for value, sharding in zip(values, shardings, strict=True)
    ]


def _leaf_bytes(value: Any, sharding: Any) -> list[int]:
    """Bytes of each array of an argument on one device."""
    arrays = jax.tree.leaves(value, is_leaf=lambda node: hasattr(node, "shape"))
    shardings = jax.tree.leaves(sharding, is_leaf=lambda node: node is None)
    return [
        0 if leaf is None else math.prod(leaf.shard_shape(array.shape)) * array.dtype.itemsize
        for array, leaf in zip(arrays, shardings, strict=True)
    ]


def _outer_weight_bytes(bucket: Programs) -> int:
    """Bytes of parameters outside the layers; a tied embedding, used at both ends, counts once."""
    ends = []
    for program in (bucket.embed, bucket.draw):
        (values, *_), _ = program.args_info
        (shardings, *_), _ = program.input_shardings
        ends.append(_leaf_bytes(values, shardings))
    return sum(max(sizes) for sizes in zip(*ends, strict=True))


def _step_cost(bucket: Programs, job: CompileJob, expert_reads: float) -> StepCost:
    """Cost of one step of a bucket, from its programs' texts and the compiler's counts."""
    model = job.model
    experts = model.num_experts // mesh_sizes(job.mesh)[1] if model.is_moe else 0
    blocks = [program_traffic(_text(block), expert_reads, experts) for block in bucket.blocks]
    around = (bucket.embed, bucket.pick, bucket.draw)
    ends = [program_traffic(_text(program)) for program in around]

    def total(name: str) -> float | None:
        def counted(programs: Sequence[jax.stages.Compiled]) -> list[float]:
            return [float((p.cost_analysis() or {}).get(name, -1)) for p in programs]

        of_blocks = counted(bucket.blocks)
        # The compiler gives a negative number for loops whose length it does not know.
        if min(of_blocks) < 0:
            return None
        layers = sum(of_blocks[form] for form in bucket.forms)
        return layers + sum(max(0.0, other) for other in counted(around))

    layers = sum(blocks[form].nbytes for form in bucket.forms)
    return StepCost(
        moved_bytes=layers + sum(end.nbytes for end in ends),
        flops=total("flops"),
        layer_collectives=blocks[0].collectives,
        outer_collectives=tuple(collective for end in ends for collective in end.collectives),
        xla_bytes=total("bytes accessed"),
        xla_seconds=total("optimal_seconds"),
        kernels=dict(blocks[bucket.forms[0]].kernels),
    )


def compile_in_subprocess(
    job: CompileJob, progress: Callable[[str], None] = lambda line: None
) -> CompilerReport:
    """`compile_step` in a process whose jax has the topology's devices.

    Raises CompileError with the compiler's message, or the last line of a process that died.
    """
    (topology,) = topologies(job.topology)
    fields = report_of("mixtral_jax.planning.compiler", asdict(job), topology, progress)
    return CompilerReport.from_json(fields)


def _compiled(fields: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    made = {
        "model": ModelConfig.from_json(fields["model"]),
        "weight_dtypes": tuple(map(tuple, fields["weight_dtypes"])),
    }
    job = CompileJob(**{**fields, **made})
    (topology,) = topologies(job.topology)
    return asdict(compile_step(job, target_devices(topology), progress))


if __name__ == "__main__":
    answer_job(_compiled)
