"""Programs and seconds of a start: what an engine compiles before its first answer, and again.

    python -m benchmarks.start --model FOLDER [--whole]

Two processes follow one another with one compilation cache, empty before the first. Each loads the
checkpoint, compiles what the first answers need, and answers a request; then it compiles the rest.
`--whole` takes steps of one program, as on TPU and GPU, on the CPU too. Printed for each: programs
before the first answer and in all, those that the cache did not have, and seconds.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from benchmarks.command import run
from mixtral_jax import placement
from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.compilation import CompilationCount, keep_programs
from mixtral_jax.kernels import Kernels, kernels_for_device
from mixtral_jax.sampling_params import SamplingParams
from serving.engine.build import engine_of, prepare
from serving.engine.config import EngineConfig
from serving.scheduling.request import Request

_MISS = "/jax/compilation_cache/cache_misses"


def main(
    model: Annotated[Path, typer.Option(help="Converted checkpoint.")],
    whole: Annotated[bool, typer.Option("--whole", help="Steps of one program.")] = False,
    inside: Annotated[bool, typer.Option("--inside", hidden=True)] = False,
) -> None:
    """Count the programs of a first and a second start."""
    if inside:
        print(json.dumps(started(model, whole)))
        return
    print(
        "| start | programs before the answer | compiled, not read | s to the answer | programs "
        "in all | compiled, not read | s in all |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first", "second"):
            command = [sys.executable, "-m", "benchmarks.start", "--model", str(model), "--inside"]
            done = subprocess.run(
                [*command, *(["--whole"] if whole else [])],
                env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            row = json.loads(done.stdout.splitlines()[-1])
            cells = [f"{value:.1f}" if isinstance(value, float) else str(value) for value in row]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def started(folder: Path, is_whole: bool) -> list[Any]:
    """The figures of one start, in this process."""
    if is_whole:

        def whole_kernels(device: jax.Device) -> Kernels:
            return replace(kernels_for_device(device), whole_step=True)

        placement.kernels_for_device = whole_kernels  # type: ignore[attr-defined]
    keep_programs()
    misses = [0]

    def note(event: str, **facts: str | int) -> None:
        misses[0] += event == _MISS

    jax.monitoring.register_event_listener(note)
    begun = time.monotonic()
    with CompilationCount() as count:
        prepared = prepare(
            EngineConfig(
                model=str(folder),
                dtype=None,
                mesh="auto",
                dp_attention=False,
                max_sequences=None,
                max_step_tokens=None,
                max_waiting=8,
                kv_memory=None,
                kv_dtype=None,
                prefix_reuse=True,
                deterministic=False,
            ),
            open_pretrained(str(folder)),
            lambda line: print(line, file=sys.stderr),
        )
        engine = engine_of(prepared.model, prepared.limits, prepared.steps)
        sampling = SamplingParams(temperature=0.0)
        engine.add(
            Request(
                id="a",
                prompt_ids=(1, 2, 3),
                sampling=sampling,
                max_tokens=1,
                eos_ids=frozenset(),
            )
        )
        while engine.has_work:
            engine.step()
        figures: list[Any] = [count.value, misses[0], time.monotonic() - begun]
        if prepared.steps.whole is not None:
            prepared.steps.whole.compile_rest()
        return [*figures, count.value, misses[0], time.monotonic() - begun]


if __name__ == "__main__":
    run(main, "benchmarks.start")
