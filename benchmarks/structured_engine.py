"""Cost of grammars in a full batch: none, half and all of 32 rows hold a schema of six fields.

    python -m benchmarks.structured_engine CHECKPOINT [--repeats 5] [--tokens 96] [--json FILE]

Every row has a list of objects and is cut at the same number of tokens, so that all three batches
give as many tokens. They run in turns, in one process. `tokens` are ratios of tokens a second to
the batch without grammars; forced tokens count as others do, and save the steps that are shown.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command import run
from mixtral_jax import SamplingParams, load
from mixtral_jax.compilation import keep_programs
from mixtral_jax.structure.form import Form, form_of
from mixtral_jax.structure.grammar import grammar_of
from mixtral_jax.structure.matcher import Guide
from mixtral_jax.structure.specification import Kind, Specification
from serving.engine.build import compile_steps, engine_of
from serving.engine.engine import Engine
from serving.scheduling.request import Request
from serving.scheduling.step_plan import Limits

ROWS = 32
_FIELDS: dict[str, Any] = {
    "name": {"type": "string", "minLength": 3, "maxLength": 30},
    "city": {"type": "string", "minLength": 3, "maxLength": 30},
    "born": {"type": "string", "format": "date"},
    "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "member": {"type": "boolean"},
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
}
SCHEMA = {
    "type": "array",
    "minItems": 50,
    "items": {
        "type": "object",
        "properties": _FIELDS,
        "required": [*_FIELDS],
        "additionalProperties": False,
    },
}


def main(
    checkpoint: Path,
    repeats: Annotated[int, typer.Option(help="Rounds of the three batches.")] = 5,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 96,
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures as JSON.")] = None,
) -> None:
    """Measures tokens a second with grammars in none, half and all of 32 rows."""
    keep_programs()
    model, tokenizer = load(checkpoint)
    assert tokenizer is not None
    limits = Limits(
        num_pages=ROWS * 32,
        page_size=16,
        max_sequences=ROWS,
        max_step_tokens=256,
        max_context=512,
        max_waiting=ROWS,
        prefix_reuse=False,
    )
    engine = engine_of(model, limits, compile_steps(model, limits))
    guide = Guide(tokenizer, model.config.vocab_size)
    grammar = grammar_of(Specification(Kind.JSON_SCHEMA, json.dumps(SCHEMA)), space=False)
    form = form_of(grammar, guide)
    prompt = tuple(tokenizer.encode("Write down the members of the club as JSON, all of them:"))
    counts = {"none": 0, "half": ROWS // 2, "all": ROWS}
    seconds: dict[str, list[float]] = {name: [] for name in counts}
    steps: dict[str, int] = {}
    for number in range(repeats + 1):
        for name, count in counts.items():
            for row in range(ROWS):
                held = form if row < count else None
                engine.add(_request(f"{name} {number} {row}", prompt, tokens, number, held))
            taken, steps[name] = _drained(engine)
            if number:  # the first round warms up
                seconds[name].append(taken)
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds["none"], seconds[name], strict=True))
        for name in counts
    }
    figures = {
        "tokens_a_second": {
            name: round(ROWS * tokens / statistics.median(s), 1) for name, s in seconds.items()
        },
        "tokens": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "steps": steps,
    }
    print(json.dumps(figures))
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def _request(
    name: str, prompt: tuple[int, ...], tokens: int, seed: int, form: Form | None
) -> Request:
    return Request(
        id=name,
        prompt_ids=prompt,
        sampling=SamplingParams(temperature=0.8, seed=seed),
        max_tokens=tokens,
        eos_ids=frozenset(),
        form=form,
    )


def _drained(engine: Engine) -> tuple[float, int]:
    """Steps to the end; returns seconds and the number of steps."""
    count, start = 0, time.perf_counter()
    while engine.has_work:
        engine.step()
        count += 1
    return time.perf_counter() - start, count


if __name__ == "__main__":
    run(main, "benchmarks.structured_engine")
