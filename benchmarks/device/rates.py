"""Rates of a device: copies, products, launches, and the engine on a checkpoint."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import Transformer, held_bytes
from mixtral_jax.placement import Placement
from mixtral_jax.planning.search import known_model
from mixtral_jax.roofline.settings import (
    GivenSettings,
    chip_under,
    estimate_of,
    settings_by_chip,
)
from serving.bench.offline import OfflineEngine

_REPEATS = 7
PROMPT_TOKENS, ANSWER_TOKENS = 100, 64


def copy_rate(nbytes: int) -> float:
    """Bytes a second that an addition in place reads and writes."""
    add, x = jax.jit(lambda x: x + 1, donate_argnums=0), jnp.zeros(nbytes // 4, jnp.float32)
    x = jax.block_until_ready(add(x))
    times = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        x = jax.block_until_ready(add(x))
        times.append(time.perf_counter() - begun)
    return 2 * nbytes / median(times)


def product_rate(size: int) -> float:
    """Operations a second of a square product in bfloat16."""
    x = jnp.ones((size, size), jnp.bfloat16)
    multiply = jax.jit(lambda x: x @ x)
    return 2.0 * size**3 / _seconds(lambda: multiply(x))


def launch_seconds(arguments: int) -> float:
    """Seconds of the host for a program that computes next to nothing."""
    arrays = [jnp.zeros(8) for _ in range(arguments)]
    program = jax.jit(lambda arrays: arrays[0] + 1).lower(arrays).compile()
    program(arrays)
    times = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        for _ in range(100):
            result = program(arrays)
        times.append((time.perf_counter() - begun) / 100)
        jax.block_until_ready(result)
    return median(times)


def _seconds(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begun)
    return median(times)


class EngineRate(NamedTuple):
    """The engine at one number of rows.

    Attributes:
        rows: requests at a time.
        tokens_per_second: generated, prompts included in the time.
        step: seconds between two tokens of a request, the median.
        weights_per_second: bytes of all weights over `step`.
        estimate: seconds of a decode step by `plan`'s arithmetic; None for a chip that it does not
            know, as a CPU.
    """

    rows: int
    tokens_per_second: float
    step: float
    weights_per_second: float
    estimate: float | None


def rates_of_checkpoint(
    folder: Path, dtype: str | None, levels: Sequence[int]
) -> Iterator[EngineRate]:
    """Runs the bare engine on a checkpoint, one level after the other."""
    pretrained = open_pretrained(str(folder))
    placement = pretrained.placement(dtype, mesh=None)
    return _engine_rates(
        pretrained.card.model, placement, lambda: pretrained.load(placement), levels
    )


def rates_of_random(name: str, dtype: str, levels: Sequence[int]) -> Iterator[EngineRate]:
    """Runs it on random weights of a published model's shapes; for names see `plan --model`."""
    config = known_model(name)
    placement = Placement.of(config, dtype, mesh=None)
    return _engine_rates(
        config, placement, lambda: Transformer(config, placement, rngs=nnx.Rngs(0)), levels
    )


def _engine_rates(
    config: ModelConfig,
    placement: Placement,
    load: Callable[[], Transformer],
    levels: Sequence[int],
) -> Iterator[EngineRate]:
    weights = held_bytes(Transformer(config, placement, rngs=None))
    highest, chip = max(levels), chip_under(placement)
    settings = settings_by_chip(config, placement, chip, GivenSettings(max_sequences=highest))
    engine = OfflineEngine(
        config,
        placement,
        load,
        concurrency=highest,
        prompt_tokens=PROMPT_TOKENS,
        answer_tokens=ANSWER_TOKENS,
    )
    for rows in levels:
        level = engine.measure(rows, rows, seed=rows)
        step, estimated = level.itl["p50"], None
        if chip is not None:
            estimate = estimate_of(config, placement, chip, settings, rows)
            tokens = PROMPT_TOKENS + ANSWER_TOKENS // 2
            estimated = estimate.seconds(rows, rows, tokens).total
        yield EngineRate(rows, level.tokens_per_second, step, weights / step, estimated)
