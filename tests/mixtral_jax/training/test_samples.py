"""Greedy answers without a cache are those of the plain loop."""

import jax
import numpy as np

from mixtral_jax.config import ModelConfig
from mixtral_jax.generation import generate_tokens
from mixtral_jax.model.adapter import Adapter, AdapterConfig
from mixtral_jax.training.example import Example
from mixtral_jax.training.samples import greedy_answers, question_of
from mixtral_jax.training.step.trainee import Trainee
from tests.support.models import model_of

CONFIG = ModelConfig.tiny(vocab_size=64)


def test_a_new_adapter_answers_as_the_model_does() -> None:
    model, settings = model_of(CONFIG), AdapterConfig(rank=2)
    trainee = Trainee(model, settings)
    trained = Adapter.random(CONFIG, settings, jax.random.key(0))
    prompts = [[3, 5, 7], [9], [11, 2]]
    answers = greedy_answers(trainee, trained, trainee.frozen(model), prompts, 5, ())
    expected = [list(generate_tokens(model, prompt, max_tokens=5)) for prompt in prompts]
    assert answers == expected
    ends = {expected[0][2]}
    cut = greedy_answers(trainee, trained, trainee.frozen(model), prompts[:1], 5, ends)
    assert cut == [expected[0][: expected[0].index(expected[0][2])]]


def test_the_first_answer_of_an_example() -> None:
    weights = np.array([0, 0, 1, 1, 0, 1], np.float32)
    example = Example(np.arange(10, 16, dtype=np.int32), weights)
    assert question_of(example) == ([10, 11], [12, 13])
    last = Example(example.ids, np.array([0, 0, 0, 0, 1, 1], np.float32))
    assert question_of(last) == ([10, 11, 12, 13], [14, 15])
