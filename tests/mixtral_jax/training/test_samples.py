"""Sample answers are those of the plain loop, of the model alone and beside an adapter."""

from dataclasses import replace

import numpy as np
import pytest

from mixtral_jax.compilation import CompilationCount
from mixtral_jax.config import ModelConfig
from mixtral_jax.generation import generate_tokens
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.model.merged import merge
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from mixtral_jax.training.example import Example
from mixtral_jax.training.loop import Trainer
from mixtral_jax.training.records import EndRecord, SampleRecord
from mixtral_jax.training.samples import Question, Samples
from tests.support.adapters import random_adapter
from tests.support.models import model_of
from tests.support.training import Counting, settings

TOKENS = ByteTokenizer()
CONFIG = ModelConfig.tiny(vocab_size=TOKENS.vocab_size)


def example(prompt: list[int], answer: list[int]) -> Example:
    weights = [0.0] * len(prompt) + [1.0] * len(answer)
    return Example(np.array(prompt + answer, np.int32), np.array(weights, np.float32))


@pytest.mark.slow
def test_samples_are_what_the_plain_loop_answers() -> None:
    model = model_of(CONFIG)
    adapter, other = (random_adapter(CONFIG, AdapterConfig(rank=2), seed=seed) for seed in (0, 1))
    prompts = [[70, 72, 71], [80, 81, 82, 83, 84]]
    samples = Samples([example(prompt, [90, 2]) for prompt in prompts], TOKENS, max_tokens=6)
    assert [asked for asked, _ in samples.texts()] == [TOKENS.decode(p) for p in prompts]

    def plain(model: object) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            ids = list(generate_tokens(model, prompt, max_tokens=6, eos_ids=TOKENS.eos_ids))  # type: ignore[arg-type]
            answers.append([token for token in ids if token not in TOKENS.eos_ids])
        return answers

    assert samples.answer_ids(model) == plain(model)
    assert samples.answer_ids(model, adapter) == plain(merge(model, adapter))
    assert plain(merge(model, adapter)) != plain(model)
    with CompilationCount() as compiled:
        again = samples.answer_ids(model, other)
    assert compiled.value == 0
    assert again == plain(merge(model, other))


def test_the_first_answer_of_an_example() -> None:
    weights = np.array([0, 0, 1, 1, 0, 1], np.float32)
    document = Example(np.arange(10, 16, dtype=np.int32), weights)
    assert Question.of(document) == ([10, 11], [12, 13])
    last = Example(document.ids, np.array([0, 0, 0, 0, 1, 1], np.float32))
    assert Question.of(last) == ([10, 11, 12, 13], [14, 15])


def test_a_run_on_int4_goes_on_after_samples() -> None:
    """Samples are drawn by steps, for which weights stand in another order on CPU."""
    config = replace(CONFIG, head_size=32, num_experts=0, experts_per_token=0)
    run = settings(steps=2, validate_every=1)
    rows = Counting(config, run.rows)
    samples = Samples([example([70, 72, 71], [90, 2])], TOKENS, max_tokens=2)
    trainer = Trainer(
        model_of(config, "int4"), run, rows, validation=[rows.batch(9)], samples=samples
    )
    records = [*trainer.records()]
    assert [r.step for r in records if isinstance(r, SampleRecord)] == [1, 2]
    assert records[-1] == EndRecord(step=2, is_finished=True)
