"""Cost of adapters in a full batch: 32 rows of the base, of one adapter, of eight and the base.

    python -m benchmarks.adapters [CHECKPOINT] [--wide LAYERS] [--repeats 5] [--tokens 64]
        [--adapters 8] [--rank 16] [--json FILE]

With --wide there is no checkpoint: the model has LAYERS layers of Mistral 7B's sizes, int8 and
random, and a small vocabulary, so that the layers take nearly all of the time. The batches run in
turns, in one process; `ratios` are tokens a second to the base alone, where the engine runs the
programs that it runs without adapters. `load` is the time from an adapter in memory to its slot,
and the programs that were compiled for it.
"""

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from flax import nnx

from benchmarks.command import run
from mixtral_jax import SamplingParams, load
from mixtral_jax.checkpoint.adapter import StoredAdapter
from mixtral_jax.compilation import CompilationCount, keep_programs
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.adapter import Adapter, AdapterConfig, LowRank
from mixtral_jax.model.adapter_stack import StackSizes, slot_bytes
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.placement import Placement
from serving.engine.build import compile_steps, engine_of
from serving.engine.engine import Engine
from serving.scheduling.request import Request
from serving.scheduling.step_plan import Limits

ROWS = 32
_PROMPT = 16  # tokens


def main(
    checkpoint: Annotated[Path | None, typer.Argument(help="A checkpoint of ours.")] = None,
    wide: Annotated[int, typer.Option(help="Layers of Mistral 7B's sizes instead.")] = 0,
    repeats: Annotated[int, typer.Option(help="Rounds of the batches.")] = 5,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    adapters: Annotated[int, typer.Option(help="Adapters in one batch.")] = 8,
    rank: Annotated[int, typer.Option(help="Rank of each.")] = 16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures as JSON.")] = None,
) -> None:
    """Measures tokens a second with adapters in none and in all of 32 rows."""
    keep_programs()
    model = _wide(wide) if checkpoint is None else load(checkpoint)[0]
    limits = Limits(
        num_pages=ROWS * 16,
        page_size=16,
        max_sequences=ROWS,
        max_step_tokens=256,
        max_context=256,
        max_waiting=ROWS,
        prefix_reuse=False,
    )
    settings = AdapterConfig(rank=rank)
    sizes = StackSizes(slots=adapters, rank=rank, targets=settings.targets)
    steps = compile_steps(model, limits, has_masks=False, adapters=sizes)
    engine = engine_of(model, limits, steps)
    loads = []
    with CompilationCount() as compiled:
        for number in range(adapters):
            stored = _adapter(model.config, settings, number)
            start = time.perf_counter()
            engine.load_adapter(str(number), stored)
            loads.append(time.perf_counter() - start)
    # One of nine neighbours has the base.
    batches = {
        "base": [""] * ROWS,
        "one adapter": ["0"] * ROWS,
        "several": [str(row % (adapters + 1) - 1).replace("-1", "") for row in range(ROWS)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for number in range(repeats + 1):
        for name, rows in batches.items():
            for row, adapter in enumerate(rows):
                engine.add(_request(f"{name} {number} {row}", model.config, tokens, row, adapter))
            taken = _drained(engine)
            if number:  # the first round warms up
                seconds[name].append(taken)
    figures = {
        "tokens_a_second": {
            name: round(ROWS * tokens / statistics.median(s), 1) for name, s in seconds.items()
        },
        "ratios": {
            name: round(
                statistics.median(a / b for a, b in zip(seconds["base"], s, strict=True)), 3
            )
            for name, s in seconds.items()
        },
        "load": {"seconds": round(max(loads), 3), "compilations": compiled.value},
        "bytes_a_slot": slot_bytes(model.config, model.placement, sizes),
    }
    print(json.dumps(figures))
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def _wide(layers: int) -> Transformer:
    """Some layers of Mistral 7B's sizes, int8 and random."""
    if layers < 1:
        raise typer.BadParameter("give a checkpoint, or --wide with a number of layers")
    config = replace(ModelConfig.mistral_7b_v01(), num_layers=layers, vocab_size=4096)
    return Transformer(config, Placement.of(config, "int8", None), rngs=nnx.Rngs(0))


def _adapter(config: ModelConfig, settings: AdapterConfig, seed: int) -> StoredAdapter:
    drawn = np.random.default_rng(seed)

    def filled(low: LowRank | None) -> LowRank | None:
        if low is None:
            return None
        arrays = (0.01 * drawn.standard_normal(x.shape, np.float32) for x in low)
        return LowRank(*arrays)  # type: ignore[arg-type]

    layers = Adapter.random(config, settings, None).layers
    adapter = Adapter(tuple(type(block)(*map(filled, block)) for block in layers))
    return StoredAdapter(settings, adapter, f"{seed:064x}", "random")


def _request(name: str, config: ModelConfig, tokens: int, seed: int, adapter: str) -> Request:
    prompt = np.random.default_rng(seed).integers(0, config.vocab_size, _PROMPT)
    return Request(
        id=name,
        prompt_ids=tuple(prompt.tolist()),
        sampling=SamplingParams(temperature=0.8, seed=seed),
        max_tokens=tokens,
        eos_ids=frozenset(),
        adapter=adapter,
    )


def _drained(engine: Engine) -> float:
    """Steps to the end; returns seconds."""
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    run(main, "benchmarks.adapters")
