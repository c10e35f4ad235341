"""The host's time for a step: one program for all of it beside a program for each layer.

    python -m benchmarks.host_step [--layers 32] [--rows 32]
    NPROC=16 python -m benchmarks.host_step --devices 8     (docs/devices.md says why NPROC)

A tiny model of many layers, so that the devices have next to nothing to compute, on virtual devices
of the CPU. Each form's steps take turns in one run. Printed are medians of milliseconds from the
plan of a step until it is launched: of the wall clock, and of the launching thread's own processor
time, which what the virtual devices do meanwhile does not disturb.
"""

import argparse
import time
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels import kernels_for
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.placement import Placement
from mixtral_jax.sampling_params import SamplingParams
from serving.engine.build import compile_steps
from serving.engine.runner import Runner, RunningStep
from serving.scheduling.step_plan import Chunk, Limits, StepPlan

_PAGE = 16
_CONTEXT = 512
_ROUNDS = 5


class Times(NamedTuple):
    """Milliseconds of launches, and of the wait for the draws."""

    wall: float
    thread: float
    read: float


def runner_of(layers: int, rows: int, devices: int, *, is_whole: bool) -> Runner:
    """A runner of a tiny model, split over all virtual devices by `tensor`."""
    config = replace(
        ModelConfig.tiny(vocab_size=256),
        num_layers=layers,
        num_heads=8,
        num_kv_heads=8,
        sliding_window=None,
        max_context=_CONTEXT,
    )
    mesh = None if devices == 1 else f"data=1,expert=1,tensor={devices}"
    placement = Placement.of(config, "float32", mesh)
    kernels = replace(kernels_for("cpu"), whole_step=is_whole)
    model = Transformer(config, replace(placement, kernels=kernels), rngs=nnx.Rngs(0))
    limits = Limits(
        num_pages=rows * _CONTEXT // _PAGE,
        page_size=_PAGE,
        max_sequences=rows,
        max_step_tokens=rows,
        max_context=_CONTEXT,
        max_waiting=rows,
    )
    return Runner(model, compile_steps(model, limits, has_masks=False))


def plan_of(rows: int, start: int) -> StepPlan:
    """A step of one token for each row, with as many tokens before."""
    width = _CONTEXT // _PAGE
    chunks = tuple(
        Chunk(
            request_id=str(row),
            choice=0,
            token_ids=(row,),
            start=start,
            pages=tuple(range(row * width, row * width + start // _PAGE + 1)),
            follows=None,
            sampling=SamplingParams(temperature=0.7, seed=row),
            seed=row,
            prompt_length=1,
            samples=True,
            history=(),
            forbidden=frozenset(),
        )
        for row in range(rows)
    )
    return StepPlan(chunks=chunks)


def timed(runner: Runner, plan: StepPlan, before: RunningStep) -> tuple[Times, RunningStep]:
    """Launches a step while the one before it runs, as an engine does, and waits for that one."""
    wall, thread = time.perf_counter(), time.thread_time()
    step = runner.launch([plan])
    launched, own = time.perf_counter(), time.thread_time()
    before.drawn()
    read = time.perf_counter()
    return Times((launched - wall) * 1e3, (own - thread) * 1e3, (read - launched) * 1e3), step


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1, help="virtual devices, 1 to 8")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", given.devices)
    forms = {
        name: runner_of(given.layers, given.rows, given.devices, is_whole=is_whole)
        for name, is_whole in (("layer by layer", False), ("one program", True))
    }
    times: dict[str, list[Times]] = {name: [] for name in forms}
    for _ in range(_ROUNDS):
        for name, runner in forms.items():
            running = runner.launch([plan_of(given.rows, 1)])
            for step in range(2, given.steps // _ROUNDS):
                taken, running = timed(runner, plan_of(given.rows, step), running)
                times[name].append(taken)
            running.drawn()
    print(f"{given.layers} layers, {given.rows} rows, {given.devices} devices, ms a step (median)")
    print("| form | launch, wall | launch, thread | wait for the draws |")
    print("|---|---|---|---|")
    for name, measured in times.items():
        rest = measured[len(measured) // 10 :]  # the first ones find caches cold
        wall, thread, read = (median(values) for values in np.array(rest).T.tolist())
        print(f"| {name} | {wall:.2f} | {thread:.2f} | {read:.2f} |")


if __name__ == "__main__":
    main()
