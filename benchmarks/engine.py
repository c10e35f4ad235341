"""The cost of parts of the engine against the bounds of the hardware, at SmolLM2's shapes.

    python -m benchmarks.engine [--dtype int8] [--json FILE]

    context   a decode step of 8 sequences at context 128 and at 2,048: the extra time against
              reading the extra keys and values at the memory bandwidth measured in the same run
    prefix    time to the first token of a prompt whose first 1,500 tokens were seen before,
              against the time of the first such prompt
    experts   a decode step of 8 sequences through 8 experts, 2 a token, against the dense model,
              and the ratio of the weight bytes that both touch
    rhythm    16 streams beside which a prompt of 6,000 tokens comes: the 99th percentile of the
              time between their tokens against that before it came, and the time of the prompt
              against its time alone; as `serve` bounds prompts, and without a bound

Weights are random: time does not depend on them, but for the experts that tokens choose, which are
counted. Each figure is the median of --repeats.
"""

import json
import math
import os
import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from operator import truediv
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from rich.console import Console

from benchmarks.command import run
from mixtral_jax.compilation import keep_programs
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.layers import Rotary
from mixtral_jax.model.moe import MoE, route
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.placement import Placement
from mixtral_jax.sampling_params import SamplingParams
from serving.bench.report import facts
from serving.engine.build import compile_steps, engine_of
from serving.engine.engine import Engine
from serving.flags import SERVICE
from serving.scheduling.request import Request
from serving.scheduling.step_plan import Limits

ROWS = 8
SHORT, LONG = 128, 2048
STREAMS, LONG_PROMPT = 16, 6000
STEPS = 10  # of a sample


def main(
    dtype: Annotated[
        Literal["int8", "float32"], typer.Option(help="Type of the weights.")
    ] = "int8",
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each figure.")] = 5,
    only: Annotated[
        Literal["context", "prefix", "experts", "rhythm"] | None,
        typer.Option(help="Measure this part alone."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """Measure the parts of the engine against the bandwidth of the memory."""
    keep_programs()
    console = Console(stderr=True)
    figures: dict[str, Any] = {"machine": facts(), "dtype": dtype}
    parts = {"context": context, "prefix": prefix, "experts": experts, "rhythm": rhythm}
    for name, measure in parts.items():
        if only is not None and name != only:
            continue
        with console.status(f"measuring {name}"):
            figures[name] = measure(dtype, repeats)
        print(name, json.dumps(figures[name]))
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def _model(config: ModelConfig, dtype: str) -> Transformer:
    """A model with random weights on one device."""
    return Transformer(config, Placement.of(config, dtype, mesh=None), rngs=nnx.Rngs(0))


def context(dtype: str, repeats: int) -> dict[str, float]:
    """The cost of long contexts. Milliseconds and GB/s."""
    config = ModelConfig.smollm2_135m()
    model = _model(config, dtype)
    token_bytes = 2 * config.num_kv_heads * config.head_size * jnp.dtype(model.dtype).itemsize
    engine = _engine(model, LONG + 512)
    short, long, bandwidth, ratios = [], [], [], []
    for _ in range(repeats):
        bandwidth.append(memory_bandwidth())
        short.append(_decode_step(engine, SHORT))
        long.append(_decode_step(engine, LONG))
        tokens = ROWS * (long[-1][1] - short[-1][1])
        reading = tokens * config.num_layers * token_bytes / bandwidth[-1]
        ratios.append((long[-1][0] - short[-1][0]) / reading)
    return {
        "step_at_128_ms": round(1e3 * statistics.median(s for s, _ in short), 2),
        "step_at_2048_ms": round(1e3 * statistics.median(s for s, _ in long), 2),
        "bandwidth_gb_s": round(statistics.median(bandwidth) / 1e9, 2),
        "extra_over_reading": round(statistics.median(ratios), 3),
    }


def prefix(dtype: str, repeats: int) -> dict[str, float]:
    """The gain of a prefix that was seen before. Milliseconds."""
    model = _model(ModelConfig.smollm2_135m(), dtype)
    engine = _engine(model, 2048)
    first, second = [], []
    for number in range(repeats + 1):
        dice = random.Random(number)
        shared = [dice.randrange(1000, 40000) for _ in range(1500)]
        times = []
        for _ in range(2):
            engine.add(_request([*shared, *(dice.randrange(1000, 40000) for _ in range(20))], 1))
            times.append(timed(lambda: _drain(engine)))
        if number:  # the first warms up
            first.append(times[0])
            second.append(times[1])
    ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    return {
        "first_ms": round(1e3 * statistics.median(first), 1),
        "second_ms": round(1e3 * statistics.median(second), 1),
        "second_over_first": round(ratio, 3),
    }


def experts(dtype: str, repeats: int) -> dict[str, float]:
    """The cost of eight experts against one feed-forward. Milliseconds and bytes."""
    config = ModelConfig.smollm2_135m()
    mixed = replace(config, num_experts=8, experts_per_token=2)
    sparse = _model(mixed, dtype)
    touched = _touched(sparse)
    dense = _model(config, dtype)
    matrix = config.hidden_size * config.feed_forward_size * 3
    around = (
        sum(x.size for x in jax.tree.leaves(nnx.state(dense, nnx.Param)) if x.ndim > 1)
        - config.num_layers * matrix
    )
    asked = (around + touched * matrix) / (around + config.num_layers * matrix)
    engines = [_engine(model, 512) for model in (dense, sparse)]
    samples = [[_decode_step(engine, SHORT)[0] for engine in engines] for _ in range(repeats)]
    ratio = statistics.median(b / a for a, b in samples)
    return {
        "dense_ms": round(1e3 * statistics.median(a for a, _ in samples), 2),
        "experts_ms": round(1e3 * statistics.median(b for _, b in samples), 2),
        "experts_touched_a_layer": round(touched / config.num_layers, 2),
        "weight_bytes_ratio": round(asked, 3),
        "time_ratio": round(ratio, 3),
        "time_over_bytes": round(ratio / asked, 3),
    }


def rhythm(dtype: str, repeats: int) -> dict[str, float]:
    """The pace of answers beside a long prompt. Milliseconds."""
    model = _model(ModelConfig.smollm2_135m(), dtype)
    limits = Limits(
        num_pages=(STREAMS * 4096 + LONG_PROMPT + 512) // 16,
        page_size=16,
        max_sequences=32,
        max_step_tokens=128,
        max_context=8192,
        max_waiting=STREAMS,
    )
    steps = compile_steps(model, limits)
    slowdown = float(next(flag.default for flag in SERVICE if flag.name == "max_decode_slowdown"))
    figures: dict[str, float] = {}
    for name, bound in (("bounded", slowdown), ("unbounded", math.inf)):
        samples = []
        for number in range(repeats):
            engine = engine_of(model, limits, steps, max_decode_slowdown=bound)
            samples.append(_long_prompt(engine, number))
        quiet, beside, prompt, alone = zip(*samples, strict=True)
        figures |= {
            f"{name}_quiet_p99_ms": round(1e3 * statistics.median(quiet), 2),
            f"{name}_beside_p99_ms": round(1e3 * statistics.median(beside), 2),
            f"{name}_prompt_ms": round(1e3 * statistics.median(prompt), 1),
            f"{name}_prompt_alone_ms": round(1e3 * statistics.median(alone), 1),
            f"{name}_p99_ratio": round(statistics.median(map(truediv, beside, quiet)), 3),
            f"{name}_prompt_ratio": round(statistics.median(map(truediv, prompt, alone)), 3),
        }
    return figures


def _long_prompt(engine: Engine, number: int) -> tuple[float, float, float, float]:
    """Seconds between tokens of streams before a long prompt and beside it (99th percentiles), and
    of the prompt beside them and alone.
    """
    dice = random.Random(number)

    def prompt(length: int, max_tokens: int) -> Request:
        return _request([dice.randrange(1000, 40000) for _ in range(length)], max_tokens)

    streams = [prompt(100, 2**20) for _ in range(STREAMS)]
    for request in streams:
        engine.add(request)
    for _ in range(30):
        engine.step()
    quiet = _pace(engine, lambda turns, drawn: turns == 300)
    long = prompt(LONG_PROMPT, 1)
    engine.add(long)
    start = time.perf_counter()
    beside = _pace(engine, lambda turns, drawn: long.id in drawn)
    seconds = time.perf_counter() - start
    for request in streams:
        engine.cancel(request.id)
    _drain(engine)
    engine.add(prompt(LONG_PROMPT, 1))
    alone = timed(lambda: _drain(engine))
    return quiet, beside, seconds, alone


def _pace(engine: Engine, ends: Callable[[int, set[str]], bool]) -> float:
    """The 99th percentile of the seconds between turns of the engine, each a token of all streams.

    `ends` is asked after each turn, with their number and the requests that drew in it.
    """
    times, drawn = [time.perf_counter()], set[str]()
    while not ends(len(times) - 1, drawn):
        drawn = {event.request_id for event in engine.step() if event.drawn is not None}
        times.append(time.perf_counter())
    gaps = sorted(b - a for a, b in pairwise(times))
    return gaps[int(0.99 * len(gaps))]


def memory_bandwidth() -> float:
    """Bytes per second of summing large arrays, one for each core."""
    cores = os.cpu_count() or 1
    arrays = [np.ones(50_000_000, np.float64) for _ in range(cores)]

    def read() -> None:
        threads = [threading.Thread(target=array.sum) for array in arrays]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return sum(array.nbytes for array in arrays) / min(timed(read) for _ in range(5))


def _touched(model: Transformer) -> int:
    """Experts that ROWS tokens choose, summed over the layers: what a decode step reads."""
    x = model.embed(jax.random.randint(jax.random.key(1), (1, ROWS), 1000, 40000))
    rotary = Rotary.at(jnp.arange(ROWS, dtype=jnp.int32)[None], model.config)
    count = 0
    for block in model.layers:
        x = x + block.attention.full(block.attention_norm.full(x), rotary)
        normed = block.feed_forward_norm.full(x)
        assert isinstance(block.feed_forward, MoE)
        choice, _ = route(block.feed_forward.router(normed[0]), 2)
        count += len(np.unique(choice))
        x = x + block.feed_forward.full(normed)
    return count


def _engine(model: Transformer, context: int) -> Engine:
    limits = Limits(
        num_pages=ROWS * context // 16,
        page_size=16,
        max_sequences=ROWS,
        max_step_tokens=128,
        max_context=context,
        max_waiting=ROWS,
    )
    return engine_of(model, limits, compile_steps(model, limits))


def _request(prompt: list[int], max_tokens: int) -> Request:
    return Request(
        id=str(time.perf_counter_ns()),
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(temperature=0.0),
        max_tokens=max_tokens,
        eos_ids=frozenset(),
    )


def _decode_step(engine: Engine, context: int) -> tuple[float, float]:
    """Seconds of one step of ROWS sequences past prompts of `context`, and their mean context."""
    dice = random.Random(context)
    requests = [
        _request([dice.randrange(1000, 40000) for _ in range(context)], 2**20) for _ in range(ROWS)
    ]
    for request in requests:
        engine.add(request)
    drawn: dict[str, int] = {}
    while len(drawn) < ROWS:
        for event in engine.step():
            if event.drawn is not None:
                drawn[event.request_id] = drawn.get(event.request_id, 0) + 1
    for _ in range(3):
        engine.step()
    seconds = timed(lambda: [engine.step() for _ in range(STEPS)]) / STEPS
    for request in requests:
        engine.cancel(request.id)
    _drain(engine)
    return seconds, context + sum(drawn.values()) / ROWS + 3 + STEPS / 2


def _drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def timed(work: Callable[[], Any]) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    run(main, "benchmarks.engine")
