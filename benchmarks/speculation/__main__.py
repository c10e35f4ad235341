"""The gain of `--speculate lookup`: tokens a second of one client, and of a full batch.

    python -m benchmarks.speculation CHECKPOINT [--repeats 5] [--tokens 160] [--json FILE]

Three kinds of text repeat what is known: a quotation, an edit of code in which a name changes, and
records of JSON. Prose does not. Each kind has three prompts, which are generated here. One answer
at a time is computed by an engine without guesses and by one with them, in turns and in one
process, and so is a batch that fills all rows. `same` says whether all tokens were equal.
"""

import json
import random
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command import run
from mixtral_jax import SamplingParams, load
from mixtral_jax.compilation import keep_programs
from serving.engine.build import compile_steps, engine_of
from serving.engine.engine import Engine
from serving.scheduling.lookup import LookUp
from serving.scheduling.request import Request
from serving.scheduling.step_plan import Limits

ROWS = 32
_WORDS = tuple(
    word
    for line in (
        "keeper lighthouse evening planks bottle letter spring piano room table sea harbour rope",
        "lamp winter captain window stairs island boat garden stone market bridge river tower",
    )
    for word in line.split()
)


def _sentences(dice: random.Random, count: int) -> str:
    def sentence() -> str:
        nouns = [dice.choice(_WORDS) for _ in range(4)]
        return "The {} of the {} lay beside the {}, and the {} was {}.".format(
            *nouns, dice.choice(["old", "green", "far away", "lost", "made of oak"])
        )

    return " ".join(sentence() for _ in range(count))


def _quotation(dice: random.Random) -> str:
    text = _sentences(dice, 10)
    return f"Text:\n{text}\n\nThe same text again, word for word:\n{text[:60]}"


def _edit(dice: random.Random) -> str:
    names = dice.sample(_WORDS, 5)
    code = "".join(
        f"def {name}_area(shape):\n    return shape.{name}_width * shape.{name}_height\n\n\n"
        for name in names
    )
    changed = code.replace("shape", "figure")
    return f"Before:\n```\n{code}```\n\nAfter, with figure in place of shape:\n```\n{changed[:150]}"


def _records(dice: random.Random) -> str:
    rows = [
        {"name": dice.choice(_WORDS), "place": dice.choice(_WORDS), "price": dice.randrange(99)}
        for _ in range(6)
    ]
    return "[\n" + "".join(f" {json.dumps(row)},\n" for row in rows)


def _prose(dice: random.Random) -> str:
    return f"A story about a {dice.choice(_WORDS)} and a {dice.choice(_WORDS)}. Once upon a time"


KINDS = {"quotation": _quotation, "edit": _edit, "records": _records, "prose": _prose}


def main(
    checkpoint: Path,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 160,
    json_file: Annotated[Path | None, typer.Option("--json", help="Figures as JSON.")] = None,
) -> None:
    """Measure tokens a second with guesses and without them."""
    keep_programs()
    model, tokenizer = load(checkpoint)
    assert tokenizer is not None
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
    guessing = engine_of(model, limits, steps, max_decode_slowdown=2.3, proposer=LookUp.of)
    figures: list[dict[str, Any]] = []
    print("| text | rows | tokens/s | with guesses | ratio | guesses right | same |")
    print("|---|---|---|---|---|---|---|")
    loads = [(kind, 1) for kind in KINDS] + [("records", ROWS), ("prose", ROWS)]
    for kind, rows in loads:
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
            "right": f"{accepted} of {checked}",
            "same": is_same,
        }
        print(f"| {' | '.join(str(value) for value in row.values())} |", flush=True)
        figures.append(row)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1), encoding="utf-8")


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
