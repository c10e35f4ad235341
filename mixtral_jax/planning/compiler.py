"""Compiles the real serving step for a topology that is not there, and says what was found.

`compiled` works in this process, whose jax must know the devices; `compile_elsewhere` starts one
that does, which can be interrupted, and which leaves the caller's jax alone. It is told what to
compile in a line of JSON on its standard input, and answers in lines of JSON.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import UserError
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.planning import traffic
from mixtral_jax.planning.chips import topologies
from mixtral_jax.planning.topology import absent_devices, environment
from mixtral_jax.planning.traffic import Collective
from mixtral_jax.sharding import ShardingRules, make_mesh
from mixtral_jax.step.programs import Programs, Steps, StepSizes, compile_buckets

_MAX_BIASES = 320  # as the engine has


class CompileError(UserError):
    """A program that the compiler refuses, such as one that does not fit."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be compiled. Numbers of tokens and sequences are those of one part."""

    model: ModelConfig
    dtype: str
    kv_dtype: str | None
    topology: str
    mesh: tuple[int, int, int, int]  # sizes of the axes
    dp_attention: bool
    sequences: int
    context: int
    num_pages: int
    page_size: int
    prefill: int  # tokens of a step that takes in a prompt
    experts_touched: float  # of those that a device holds, by a decode step

    @property
    def activations(self) -> Any:
        """Between weights of int8, CPU computes in float32 and accelerators in bfloat16."""
        accelerator = not self.topology.startswith("cpu")
        return jnp.bfloat16 if self.dtype == "int8" and accelerator else None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one step, on one device: all programs, the block as often as there are layers."""

    nbytes: float  # to and from memory, but for reading pages
    flops: float | None  # as the compiler counts them; None where it does not
    layer: tuple[Collective, ...]
    around: tuple[Collective, ...]  # of the programs before and behind the layers
    # The compiler's own figures: bytes of all memories, and seconds.
    xla_bytes: float | None
    xla_seconds: float | None
    kernels: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """Bytes on one device as the compiler lays arrays out, and what steps cost."""

    weights: int
    pages: int
    temporaries: int
    programs: int
    decode: Cost
    prefill: Cost

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Compiled":
        for step in ("decode", "prefill"):
            cost = found[step]
            for place in ("layer", "around"):
                cost[place] = tuple(Collective(**one) for one in cost[place])
            found[step] = Cost(**cost)
        return cls(**found)


def abstract(job: Job, devices: Sequence[jax.Device]) -> Transformer:
    """The job's model, split but without values."""
    data, expert, tensor, copies = job.mesh
    mesh = make_mesh(data, expert, tensor * copies, devices, copies)
    rules = ShardingRules.of(job.model, mesh, job.dp_attention)
    return Transformer(
        job.model,
        dtype=job.dtype,
        activations=job.activations,
        rngs=None,
        mesh=mesh,
        rules=rules,
    )


def compiled(
    job: Job, devices: Sequence[jax.Device], progress: Callable[[str], None] = lambda line: None
) -> Compiled:
    """Compiles a step of as many tokens as sequences, and one of `prefill` tokens."""
    model = abstract(job, devices)
    sizes = StepSizes(
        num_pages=job.num_pages,
        page_size=job.page_size,
        max_sequences=job.sequences,
        max_context=job.context,
        max_biases=_MAX_BIASES,
    )
    prefill = max(job.prefill, job.sequences)
    rows = {job.sequences: job.sequences, prefill: job.sequences}
    steps = compile_buckets(model, sizes, rows, progress, job.kv_dtype)
    decode, chunk = steps.buckets[job.sequences], steps.buckets[prefill]
    return Compiled(
        **_memory(model, steps),
        decode=_cost(decode, job, job.experts_touched),
        prefill=_cost(chunk, job, 1.0),
    )


def _memory(model: Transformer, steps: Steps) -> dict[str, int]:
    """Arguments of the programs as they lie in memory, and what comes and goes."""
    buckets = list(steps.buckets.values())
    layers = model.config.num_layers
    block = buckets[0].block
    facts = block.memory_analysis()
    # Pages are all that a block gives back in place.
    pages = facts.alias_size_in_bytes or _held(block)[3]
    _, x, rotary, _, batch = _held(block)
    of_block = facts.argument_size_in_bytes - pages - x - rotary - batch
    every = {id(p): p for b in buckets for p in (b.embed, b.block, b.pick, b.draw)}.values()
    found = [program.memory_analysis() for program in every]
    # One program runs at a time, but those behind it have the place for their results already.
    results = max(b.block.memory_analysis().output_size_in_bytes for b in buckets) - pages
    given = max(sum(_held(b.embed)[1:]) + sum(_held(b.draw)[1:]) for b in buckets)
    return {
        "weights": layers * of_block + _around(buckets[0]),
        "pages": layers * pages,
        "temporaries": (
            max(one.temp_size_in_bytes for one in found) + layers * max(results, 0) + given
        ),
        "programs": sum(one.generated_code_size_in_bytes for one in found),
    }


def _held(program: Any) -> list[int]:
    """Bytes of each argument on one device; nothing of what the program does not use."""
    values, _ = program.args_info
    places, _ = program.input_shardings
    return [sum(_leaves(value, place)) for value, place in zip(values, places, strict=True)]


def _leaves(value: Any, place: Any) -> list[int]:
    arrays = jax.tree.leaves(value, is_leaf=lambda node: hasattr(node, "shape"))
    shardings = jax.tree.leaves(place, is_leaf=lambda node: node is None)
    return [
        0
        if sharding is None
        else math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array, sharding in zip(arrays, shardings, strict=True)
    ]


def _around(bucket: Programs) -> int:
    """Parameters outside the layers; a tied embedding is used at both ends."""
    ends = []
    for program in (bucket.embed, bucket.draw):
        (values, *_), _ = program.args_info
        (places, *_), _ = program.input_shardings
        ends.append(_leaves(values, places))
    return sum(max(used) for used in zip(*ends, strict=True))


def _cost(bucket: Programs, job: Job, touched: float) -> Cost:
    model = job.model
    held = model.num_experts // job.mesh[1] if model.is_moe else 0
    layers = model.num_layers
    block = traffic.moved(bucket.block.as_text(), touched, held)
    ends = [traffic.moved(p.as_text()) for p in (bucket.embed, bucket.pick, bucket.draw)]
    counted = [p.cost_analysis() for p in (bucket.block, bucket.embed, bucket.pick, bucket.draw)]

    def total(name: str) -> float | None:
        one, *others = (float((facts or {}).get(name, -1)) for facts in counted)
        # Of loops whose end it does not know the compiler gives less than nothing.
        return None if one < 0 else layers * one + sum(max(0.0, other) for other in others)

    return Cost(
        nbytes=layers * block.nbytes + sum(end.nbytes for end in ends),
        flops=total("flops"),
        layer=block.collectives,
        around=tuple(one for end in ends for one in end.collectives),
        xla_bytes=total("bytes accessed"),
        xla_seconds=total("optimal_seconds"),
        kernels=dict(block.kernels),
    )


def compile_elsewhere(job: Job, progress: Callable[[str], None] = lambda line: None) -> Compiled:
    """`compiled` in a process that believes to have the devices; raises CompileError."""
    (topology,) = topologies(job.topology)
    command = [sys.executable, "-m", "mixtral_jax.planning.compiler"]
    with (
        tempfile.TemporaryFile("w+") as noise,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            env=environment(topology),
            text=True,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(job)))
            process.stdin.close()
            for line in process.stdout:
                said = json.loads(line) if line.startswith('{"') else {}
                if "progress" in said:
                    progress(said["progress"])
                if "error" in said:
                    raise CompileError(said["error"])
                if "compiled" in said:
                    return Compiled.from_json(said["compiled"])
        finally:
            process.kill()
        noise.seek(0)
        last = noise.read().strip().splitlines()[-1:] or ["it said nothing"]
        raise CompileError(f"the compiler for {topology} ended without an answer: {last[0]}")


def main() -> None:
    """The other process: a job on standard input, what became of it on standard output."""

    def say(**said: Any) -> None:
        print(json.dumps(said), flush=True)

    told = json.loads(sys.stdin.read())
    told["model"] = ModelConfig.from_json(told["model"])
    told["mesh"] = tuple(told["mesh"])
    job = Job(**told)
    try:
        (topology,) = topologies(job.topology)
        found = compiled(job, absent_devices(topology), lambda line: say(progress=line))
    except Exception as error:
        # A compiler's message can be pages long; what it is about stands first.
        say(error=str(error).strip().partition("\n")[0][:500])
    else:
        say(compiled=asdict(found))


if __name__ == "__main__":
    main()
