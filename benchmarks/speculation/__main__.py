"""The gain of guessed tokens: tokens a second of one client, and of a full batch.

    python -m benchmarks.speculation CHECKPOINT [--repeats 5] [--tokens 160] [--json FILE]
    python -m benchmarks.speculation CHECKPOINT --draft DRAFT [--experts 8] [--noise 0.1]

The first measures `--speculate lookup`, the second `--draft-model DRAFT`; with `--experts` the
model is a mixture that is made of the dense checkpoint, and with `--noise` its experts differ.

Three kinds of text repeat what is known: a quotation, an edit of code in which a name changes, and
records of JSON. Prose does not. Each kind has three prompts, which are generated here. One answer
at a time is computed by an engine without guesses and by one with them, in turns and in one
process, and so is a batch that fills all rows. Prose is drawn at temperature 1, all else at 0.
`same` says whether all tokens were equal.
"""

import json
import random
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command import run
from benchmarks.speculation.mixture import mixture_of
from benchmarks.speculation.texts import KINDS
from mixtral_jax import SamplingParams, load
from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.compilation import keep_programs
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.step.buckets import Steps
from serving.engine.build import compile_steps, engine_of
from serving.engine.drafts.draft import Draft, LoadedDraft, compile_draft
from serving.engine.engine import Engine
from serving.scheduling.guesses.lookup import LookUp
from serving.scheduling.request import Request
from serving.scheduling.step_plan import Limits

ROWS = 32


def main(
    checkpoint: Path,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 160,
    draft: Annotated[str | None, typer.Option(help="Checkpoint of a draft model.")] = None,
    experts: Annotated[int, typer.Option(help="Experts of the model; 0: as it is stored.")] = 0,
    noise: Annotated[float, typer.Option(help="By which they differ, as a share.")] = 0.0,
    kinds: Annotated[str, typer.Option(help="Kinds of text.")] = ",".join(KINDS),
    answers: Annotated[str, typer.Option(help="Answers at a time.")] = f"1,{ROWS}",
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures as JSON.")] = None,
) -> None:
    """Measure tokens a second with guesses and without them."""
    keep_programs()
    model, tokenizer = load(checkpoint, mesh=None)
    assert tokenizer is not None
    if experts:
        model = mixture_of(model, experts, noise)
    limits = Limits(
        num_pages=ROWS * 64,
        page_size=16,
        max_sequences=ROWS,
        max_step_tokens=128,
        max_context=1024,
        max_waiting=ROWS,
        prefix_reuse=False,
    )
    steps = compile_steps(model, limits)
    plain = engine_of(model, limits, steps, max_decode_slowdown=2.3)
    guessing = _guessing(checkpoint, model, limits, steps, draft)
    figures: list[dict[str, Any]] = []
    print("| text | rows | tokens/s | with guesses | ratio | guesses right | same |")
    print("|---|---|---|---|---|---|---|")
    for kind, rows in _loads(kinds.split(","), [int(number) for number in answers.split(",")]):
        dice = random.Random(kind)
        prompts = [tuple(tokenizer.encode(KINDS[kind](dice))) for _ in range(max(3, rows))]
        batches = [prompts] if rows > 1 else [[prompt] for prompt in prompts]
        temperature = 1.0 if kind == "prose" else 0.0
        speeds: list[tuple[float, float]] = []
        is_same = True
        before = guessing.scheduler.guesses, guessing.scheduler.accepted
        for number in range(repeats + 1):
            engines = (plain, guessing) if number % 2 else (guessing, plain)
            results = {
                engine: _answered(engine, batches, tokens, temperature, number)
                for engine in engines
            }
            is_same = is_same and results[plain][1] == results[guessing][1]
            if number:  # the first round warms up
                speeds.append((results[plain][0], results[guessing][0]))
        checked = guessing.scheduler.guesses - before[0]
        accepted = guessing.scheduler.accepted - before[1]
        row = {
            "text": kind,
            "rows": rows,
            "tokens_per_second": round(statistics.median(own for own, _ in speeds)),
            "with_guesses": round(statistics.median(own for _, own in speeds)),
            "ratio": round(statistics.median(b / a for a, b in speeds), 2),
            "right": f"{accepted} of {checked} ({accepted / max(1, checked):.0%})",
            "same": is_same,
        }
        print(f"| {' | '.join(str(value) for value in row.values())} |", flush=True)
        figures.append(row)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def _loads(kinds: list[str], rows: list[int]) -> list[tuple[str, int]]:
    """Returns the kinds of text and the numbers of answers at a time that are measured."""
    of_batches = ("records", "prose")
    return [(kind, count) for count in rows for kind in kinds if count == 1 or kind in of_batches]


def _guessing(
    checkpoint: Path, model: Transformer, limits: Limits, steps: Steps, draft: str | None
) -> Engine:
    """Returns the engine that guesses, by a draft model if one is given."""
    if draft is None:
        return engine_of(model, limits, steps, max_decode_slowdown=2.3, proposer=LookUp.of)
    opened = Draft.open(draft, open_pretrained(checkpoint), model.placement)
    own = opened.limits(limits)
    loaded = LoadedDraft(opened.load(), own, compile_draft(opened.abstract, own))
    return engine_of(model, limits, steps, max_decode_slowdown=2.3, drafter=loaded.drafter())


def _answered(
    engine: Engine,
    batches: list[list[tuple[int, ...]]],
    tokens: int,
    temperature: float,
    seed: int,
) -> tuple[float, dict[str, list[int]]]:
    """Answers the batches one after the other; returns tokens a second of decoding, and tokens."""
    seconds, count, answers = 0.0, 0, dict[str, list[int]]()
    for number, prompts in enumerate(batches):
        for row, prompt in enumerate(prompts):
            name = f"{seed} {number} {row}"
            answers[name] = []
            engine.add(
                Request(
                    id=name,
                    prompt_ids=prompt,
                    sampling=SamplingParams(temperature=temperature, seed=seed),
                    max_tokens=tokens,
                    eos_ids=frozenset(),
                )
            )
        began: float | None = None
        while engine.has_work:
            for event in engine.step():
                if event.drawn is not None:
                    answers[event.request_id].append(event.drawn.token_id)
            if began is None and all(answers[f"{seed} {number} {r}"] for r in range(len(prompts))):
                began = time.perf_counter()  # all prompts are computed
                count -= sum(map(len, answers.values()))
        assert began is not None
        seconds += time.perf_counter() - began
        count += sum(map(len, answers.values()))
    return count / seconds, answers


if __name__ == "__main__":
    run(main, "benchmarks.speculation")
