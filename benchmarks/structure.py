"""Costs of a form of answers: to compile, with its trial, to keep, and a step of masks.

    python -m benchmarks.structure [--tokenizer v3] [--repeats 100] [--json FILE]

Every request asks for a schema that nobody asked for before. The vocabularies are those of the
files that mistral-common ships. "Beside an attacker" are requests of one caller while another sends
grammars that never compile, as fast as they are refused.
"""

import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import mistral_common
import numpy as np
import typer

from benchmarks.command import run
from mixtral_jax.errors import StructureError
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.form import form_of
from mixtral_jax.structure.grammar import grammar_of
from mixtral_jax.structure.matcher import Guide, Matcher
from mixtral_jax.structure.specification import Grammar, Kind, Specification
from mixtral_jax.tokenization.mistral import MistralTokenizer

_FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "tekken": "tekken_240718.json",
}
_ROWS = 32
_FIELDS: dict[str, Any] = {
    "name": {"type": "string", "maxLength": 40},
    "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "mail": {"type": "string", "format": "email"},
    "born": {"type": "string", "format": "date-time"},
    "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
    "kind": {"enum": ["a", "b", "c"]},
}


def schema(number: int) -> Specification:
    """Returns a schema of six fields, another one for each number."""
    fields = {**_FIELDS, f"field_{number}": {"type": "boolean"}}
    value = {"type": "object", "properties": fields, "required": list(fields)}
    return Specification(Kind.JSON_SCHEMA, json.dumps(value))


def milliseconds(work: Callable[[int], object], repeats: int) -> list[float]:
    """Returns the times of `work(0)`, `work(1)` ..., sorted."""
    times = []
    for number in range(repeats):
        begin = time.perf_counter()
        work(number)
        times.append((time.perf_counter() - begin) * 1e3)
    return sorted(times)


def shown(times: list[float]) -> dict[str, float]:
    """Returns median, 95th percentile and maximum."""
    return {
        "p50": round(statistics.median(times), 2),
        "p95": round(times[int(len(times) * 0.95)], 2),
        "max": round(times[-1], 2),
    }


def masks(guide: Guide, repeats: int) -> list[float]:
    """Returns milliseconds of the masks of 32 rows, each of which then draws at random."""
    rng = np.random.default_rng(0)
    form = form_of(grammar_of(schema(0), space=True), guide)
    rows = [form.matcher() for _ in range(_ROWS)]
    mask = np.zeros((_ROWS, guide.words), np.int32)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for row, matcher in enumerate(rows):
            matcher.fill(mask[row])
        times.append((time.perf_counter() - begin) * 1e3)
        bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little")
        for row, allowed in enumerate(bits):
            rows[row] = _drawn(rows[row], int(rng.choice(np.flatnonzero(allowed))), form.matcher)
    return sorted(times)


def _drawn(matcher: Matcher, token_id: int, again: Callable[[], Matcher]) -> Matcher:
    """Returns the matcher after a token; a new one where the answer has ended."""
    matcher.consume([token_id])
    return again() if matcher.has_ended else matcher


def resident_bytes() -> int:
    """Returns the memory of this process; 0 where that cannot be read."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
    except OSError:
        return 0


def memory_of_a_form(guide: Guide, count: int = 100) -> int:
    """Returns the bytes that a form of six fields takes."""
    grammars = [grammar_of(schema(number), space=True) for number in range(count)]
    forms = [form_of(grammars[0], guide)]
    before = resident_bytes()
    forms += [form_of(grammar, guide) for grammar in grammars]
    return (resident_bytes() - before) // count


def beside_an_attacker(compiler: Compiler, repeats: int) -> list[float]:
    """Returns milliseconds of one caller's requests while another's stall the compiler."""
    has_ended = threading.Event()

    def attack() -> None:
        number = 0
        while not has_ended.is_set():
            number += 1
            text = (
                f"start: A\nA: /(.*a.{{{12 + number}}}.*)/ & /(.*b.{{12}}.*)/ & ~/(.*c.{{13}}.*)/"
            )
            try:
                compiler.compile(Grammar(text), continues=False, salt=b"attacker")
            except StructureError:
                continue

    thread = threading.Thread(target=attack)
    thread.start()
    try:
        return milliseconds(
            lambda number: compiler.compile(
                schema(10_000 + number), continues=False, salt=b"bystander"
            ),
            repeats,
        )
    finally:
        has_ended.set()
        thread.join()


def main(
    tokenizer: Annotated[list[str] | None, typer.Option(help="v1, v2, v3 or tekken")] = None,
    repeats: Annotated[int, typer.Option(min=2, help="requests of each figure")] = 100,
    to: Annotated[Path | None, typer.Option("--json", help="file for the figures")] = None,
) -> None:
    """Measures what a form of answers costs."""
    figures: dict[str, Any] = {}
    for name in tokenizer or ["v3"]:
        if name not in _FILES:
            raise typer.BadParameter(f"{name!r}: choose of {', '.join(_FILES)}")
        file = Path(mistral_common.__file__).parent / "data" / _FILES[name]
        vocabulary = MistralTokenizer(file)
        guide = Guide(vocabulary, vocabulary.vocab_size)
        with Compiler(vocabulary, vocabulary.vocab_size) as compiler:
            compiler.compile(schema(-1), continues=False, salt=b"")  # its processes have started
            compiler.compile(schema(-1), continues=False, salt=b"other")

            def request(number: int, compiler: Compiler = compiler) -> None:
                compiler.compile(schema(number), continues=False, salt=b"")

            row = {
                "compile here, ms": shown(
                    milliseconds(
                        lambda number: form_of(grammar_of(schema(number), space=True), guide),  # noqa: B023
                        repeats,
                    )
                ),
                "first request with its trial, ms": shown(milliseconds(request, repeats)),
                "the same again, ms": shown(milliseconds(request, repeats)),
                "beside an attacker, ms": shown(beside_an_attacker(compiler, repeats)),
                f"masks of {_ROWS} rows, ms": shown(masks(guide, repeats)),
                "bytes of a form": memory_of_a_form(guide),
            }
        figures[name] = row
        print(name)
        for label, value in row.items():
            print(f"  {label:34} {value}")
    if to is not None:
        to.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, "benchmarks.structure")
