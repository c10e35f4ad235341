"""The parts of a step on CPU and their time, at SmolLM2's shapes.

    python -m benchmarks.step_parts [--dtype int8] [--repeats 5]

A decode step of 1, 8 and 32 rows at context 100, and the last of the four steps of a prompt of 512
tokens. Printed are the least milliseconds of the layers, of what is behind them (the product with
the vocabulary and the draw) and of the whole step from its plan to its tokens on the host; the rest
is the host's arrays and launches. Beside them stands what reading the weights once takes at the
bandwidth measured in the same run, which is the limit of a step of few rows. Weights are random.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import typer
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.command import run
from benchmarks.engine import memory_bandwidth, timed
from mixtral_jax.compilation import keep_programs
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import Transformer, held_bytes
from mixtral_jax.placement import Placement
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.step.inputs import GroupInputs, StepInputs
from mixtral_jax.step.launcher import StepLauncher
from serving.engine.build import compile_steps
from serving.engine.runner import Runner, write
from serving.scheduling.step_plan import Chunk, Limits, StepPlan

CONTEXT, PAGE, ROWS, STEP = 512, 16, 32, 128
CASES = ((1, 1, 100), (8, 1, 100), (ROWS, 1, 100), (1, STEP, CONTEXT - STEP))
"""Rows, new tokens of each and the tokens before them."""


def main(
    dtype: Annotated[
        Literal["int8", "float32"], typer.Option(help="Type of the weights.")
    ] = "int8",
    repeats: Annotated[int, typer.Option(min=1, help="Fives of calls of each part.")] = 5,
) -> None:
    """Measure the parts of a step beside the reading of its weights."""
    keep_programs()
    config = ModelConfig.smollm2_135m()
    model = Transformer(config, Placement.of(config, dtype, mesh=None), rngs=nnx.Rngs(0))
    limits = Limits(
        num_pages=ROWS * CONTEXT // PAGE,
        page_size=PAGE,
        max_sequences=ROWS,
        max_step_tokens=STEP,
        max_context=CONTEXT,
        max_waiting=ROWS,
    )
    steps = compile_steps(model, limits, has_masks=False)
    runner, launcher = Runner(model, steps), StepLauncher(model, steps)
    reading = held_bytes(model) / memory_bandwidth()
    table = Table("rows", "new tokens", "layers", "head, draw", "rest", "whole", "weights read")
    for rows, tokens, start in CASES:
        plan = plan_of(rows, tokens, start)
        inputs = steps.blank(steps.bucket(rows * tokens), rows)
        write(plan, GroupInputs(inputs, 0, ROWS))
        layers, end = parts_of(launcher, inputs, 5 * repeats)
        whole = whole_of(runner, plan, 5 * repeats)
        seconds = (layers, end, whole - layers - end, whole, reading)
        table.add_row(str(rows), str(tokens), *(f"{1e3 * spent:.2f}" for spent in seconds))
    Console().print(table)


def parts_of(launcher: StepLauncher, inputs: StepInputs, repeats: int) -> tuple[float, float]:
    """Returns the seconds of the layers, and of what is behind them."""
    walked = launcher.walk(inputs)
    layers = least(lambda: jax.block_until_ready(launcher.walk(inputs).hidden), repeats)
    return layers, least(lambda: jax.block_until_ready(launcher.draw(walked).packed), repeats)


def whole_of(runner: Runner, plan: StepPlan, repeats: int) -> float:
    """Returns the seconds of a step from its plan to its tokens on the host."""
    return least(lambda: runner.launch([plan]).drawn(), repeats)


def plan_of(rows: int, tokens: int, start: int) -> StepPlan:
    """A step of so many new tokens in each row, behind a context of `start`."""
    width = CONTEXT // PAGE
    chunks = (
        Chunk(
            request_id=str(row),
            choice=0,
            token_ids=tuple(range(1000, 1000 + tokens)),
            start=start,
            pages=tuple(range(row * width, (row + 1) * width)),
            follows=None,
            samples=True,
            sampling=SamplingParams(temperature=0.0),
            seed=row,
            prompt_length=start,
            history=(),
            forbidden=frozenset(),
        )
        for row in range(rows)
    )
    return StepPlan(chunks=tuple(chunks))


def least(work: Callable[[], Any], repeats: int) -> float:
    """Returns the shortest of some calls' seconds, which other processes disturb least."""
    return min(timed(work) for _ in range(repeats))


if __name__ == "__main__":
    run(main, "benchmarks.step_parts")
