"""Training steps of ours, for benchmarks.peers.training: prints one line of JSON and ends.

Its argument is a JSON object, {"rows", "length", "rank", "steps", "checkpoint"}: the step is the
one that `mixtral-jax train` runs, with an adapter on all linear weights beside an int8 base of
random weights, or of a checkpoint. The first step is not counted.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.restore_memory import peak
from mixtral_jax import load
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.placement import Placement
from mixtral_jax.planning.hlo import Array, Computation, Instruction, Program, parse
from mixtral_jax.training.batch import Batch
from mixtral_jax.training.config import TrainingConfig
from mixtral_jax.training.step.flops import step_flops
from mixtral_jax.training.step.program import TrainingProgram


def main() -> None:
    """Computes the steps."""
    work = json.loads(sys.argv[1])
    config = TrainingConfig(
        adapter=AdapterConfig(rank=work["rank"]),
        steps=work["steps"] + 1,
        rows=work["rows"],
        length=work["length"],
    )
    model = _model(work["checkpoint"])
    program = TrainingProgram(model, config)
    state, frozen = program.start(model, jax.random.key(0)), program.frozen(model)
    batch = _batch(config, model.config.vocab_size)
    seconds, cpu_seconds = [], []
    for _ in range(work["steps"] + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        state, metrics = program(state, frozen, batch)
        assert np.isfinite(float(metrics.loss))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    figures = {"seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:], "peak_bytes": peak()}
    # The text of the program is read when the peak is known.
    print(json.dumps({**figures, **_operations(program, model)}))


def _model(checkpoint: str | None) -> Transformer:
    if checkpoint is not None:
        return load(Path(checkpoint))[0]
    config = ModelConfig.smollm2_135m()
    return Transformer(config, Placement.of(config, "int8", None), rngs=nnx.Rngs(0))


def _batch(config: TrainingConfig, vocabulary: int) -> Batch:
    shape = (config.rows, config.length)
    tokens = np.random.default_rng(0).integers(0, vocabulary, (shape[0], shape[1] + 1), np.int32)
    ones = np.ones(shape, np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones)


def _operations(program: TrainingProgram, model: Transformer) -> dict[str, Any]:
    """Operations of the compiled products, those that a step needs, and gradients of the base.

    A step needs the forward pass, the slopes and one more forward pass, which recomputes it.
    """
    run = program.config
    forward = step_flops(model.config, replace(run, adapter=None)) / 3
    shapes = set()
    for name, variable in named_parameters(model).items():
        shape, letters = variable.get_value().shape, variable.get_metadata("axes")
        if name.endswith(".weight") and len(letters) > 1:
            outputs = 1 if letters[0] in "VDF" else 2
            shapes.add(_sorted([int(np.prod(shape[:outputs])), int(np.prod(shape[outputs:]))]))
    products = list(_products(parse(program.text())))
    return {
        "operations": sum(count for count, _ in products),
        "needed_operations": step_flops(model.config, run) + forward,
        "base_gradients": sum(_sorted(array.dims) in shapes for _, array in products),
    }


def _sorted(dims: Any) -> tuple[int, ...]:
    return tuple(sorted(dims))


def _products(program: Program) -> Iterator[tuple[float, Array]]:
    """Yields the operations of each product, times the passes of the loops around it; its array."""

    def walk(computation: Computation, times: int) -> Iterator[tuple[float, Array]]:
        for item in computation.instructions.values():
            inner = times
            if item.op == "while":
                inner *= item.number(r'known_trip_count":\{"n":"(\d+)')
            depth = _depth(computation, item)
            for array in item.arrays if depth else ():
                yield 2.0 * times * depth * float(np.prod(array.dims)), array
            for name in item.called:
                yield from walk(program.computation(name, item), inner)

    return walk(program.entry, 1)


def _depth(computation: Computation, item: Instruction) -> int:
    """The number of products in each sum of a matrix product; 0 for other instructions."""
    if item.op == "dot":
        [first] = computation.instructions[item.operands[0]].arrays
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", item.text)
        assert axes is not None
        return int(np.prod([first.dims[int(axis)] for axis in axes[1].split(",")]))
    if "mixtral_jax_linear" in item.text and item.op == "custom-call":
        [rows] = computation.instructions[item.operands[0]].arrays
        return rows.dims[1]
    return 0


if __name__ == "__main__":
    main()
