"""A model in bytes and a form, compiled once for all tests of grammars.

Tests of other subjects have models of their own, under the same names.
"""

from dataclasses import replace

import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.step.buckets import Steps
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.matcher import Guide
from serving.engine.build import compile_steps
from tests.support.forms import LIMITS, TOKENIZER, person_of
from tests.support.models import model_of


@pytest.fixture(scope="session")
def model() -> Transformer:
    config = replace(ModelConfig.tiny(vocab_size=TOKENIZER.vocab_size), max_context=256)
    return model_of(config)


@pytest.fixture(scope="session")
def steps(model: Transformer) -> Steps:
    return compile_steps(model, LIMITS)


@pytest.fixture(scope="session")
def guide() -> Guide:
    return Guide(TOKENIZER, TOKENIZER.vocab_size)


@pytest.fixture(scope="session")
def person(guide: Guide) -> Form:
    return person_of(guide)
