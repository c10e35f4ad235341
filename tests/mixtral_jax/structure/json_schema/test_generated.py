"""Generated schemas: nearly all are accepted, and what is written under them is valid."""

import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.schema import Schema, check, settle
from mixtral_jax.tokenization.tokenizer import Tokenizer
from tests.mixtral_jax.structure.json_schema.generated import Maker
from tests.mixtral_jax.structure.json_schema.walks import Vocabulary


def _settled(vocabulary: Vocabulary, seed: int, strict: bool = False) -> Schema:
    def attempt(schema: Schema) -> None:
        vocabulary.matcher(schema)

    return settle(json.dumps(Maker(seed).schema()), attempt, strict)


@pytest.mark.parametrize(
    "seeds", [range(100), pytest.param(range(500), marks=pytest.mark.soak)], ids=len
)
def test_nearly_all_are_accepted_and_the_rest_refused_with_a_pointer(seeds: range) -> None:
    vocabulary = Vocabulary.of_bytes()
    counts: Counter[str] = Counter()
    for seed in seeds:
        for strict in (False, True):
            kind = "strict" if strict else "lenient"
            try:
                schema = _settled(vocabulary, seed, strict)
            except StructureError as error:
                counts[f"{kind} refused"] += 1
                assert error.pointer.startswith("/"), (seed, str(error))
            else:
                counts[f"{kind} accepted"] += 1
                assert schema.is_enforced or not strict
    assert counts["lenient accepted"] >= 0.95 * len(seeds), counts
    assert counts["strict accepted"] >= 0.5 * len(seeds), counts


def _walk(vocabulary: Vocabulary, seeds: range, walks: int, steps: int = 400) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        try:
            schema = _settled(vocabulary, seed)
        except StructureError:
            continue
        warm = vocabulary.matcher(schema)
        random = np.random.default_rng(seed)
        for _ in range(walks):
            text = vocabulary.walk(warm, random, steps)
            if text is None:
                counts["cut"] += 1
                continue
            counts["ended"] += 1
            wrong = check(text, schema)
            if schema.is_enforced:
                assert wrong is None, (seed, text, wrong)
                counts["enforced"] += 1
    return counts


def test_random_answers_are_valid() -> None:
    counts = _walk(Vocabulary.of_bytes(), range(500, 530), 2, steps=200)
    assert counts["enforced"] > 20


@pytest.mark.soak
@pytest.mark.parametrize("name", ["bytes", "v1", "v2", "v3", "tekken-v3", "byte-level"])
def test_random_answers_are_valid_in_every_vocabulary(
    vocabularies: Callable[[str], Tokenizer], name: str
) -> None:
    counts = _walk(Vocabulary.of(vocabularies(name)), range(500), 3)
    assert counts["ended"] > 1200
