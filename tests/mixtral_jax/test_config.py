"""Presets hold the published figures; a checkpoint is known by its config file."""

import math
from dataclasses import asdict, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.checkpoint.parameters import parameter_shapes
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.generation import generate_tokens
from tests.support.models import model_of


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (ModelConfig.mistral_7b_v01(), 7_241_732_096),
        (ModelConfig.mistral_7b_instruct_v02(), 7_241_732_096),
        (ModelConfig.mistral_7b_instruct_v03(), 7_248_023_552),
        (ModelConfig.mixtral_8x7b_v01(), 46_702_792_704),
        (ModelConfig.mixtral_8x22b_instruct_v01(), 140_630_071_296),
        (ModelConfig.mathstral_7b_v01(), 7_248_023_552),
        (ModelConfig.codestral_22b_v01(), 22_247_282_688),
        (ModelConfig.mistral_small_22b_2409(), 22_247_282_688),
        (ModelConfig.mistral_nemo_12b_2407(), 12_247_782_400),
        (ModelConfig.mistral_small_24b_2501(), 23_572_403_200),
        (ModelConfig.smollm2_135m(), 134_515_008),
    ],
)
def test_parameter_counts_are_the_published_ones(config: ModelConfig, parameters: int) -> None:
    shapes = parameter_shapes(config, "bfloat16").values()
    assert sum(math.prod(shape.shape) for shape in shapes) == parameters


def test_presets_differ_where_the_models_do() -> None:
    first, second = ModelConfig.mistral_7b_v01(), ModelConfig.mistral_7b_instruct_v02()
    assert (first.rope_theta, first.sliding_window) == (10_000.0, 4096)
    assert (second.rope_theta, second.sliding_window) == (1_000_000.0, None)
    large = ModelConfig.mixtral_8x22b_instruct_v01()
    assert (large.num_experts, large.experts_per_token, large.max_context) == (8, 2, 65_536)


SMALL = ModelConfig(
    vocab_size=24,
    hidden_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=6,
    feed_forward_size=10,
    num_experts=3,
    experts_per_token=2,
    rope_theta=100.0,
    norm_eps=1e-3,
    sliding_window=4,
    max_context=9,
    tied_embeddings=False,
)
# A second value of each field. A model that never reads a field cannot tell the two apart.
OTHER: dict[str, Any] = dict(
    vocab_size=25,
    hidden_size=14,
    num_layers=1,
    num_heads=2,
    num_kv_heads=4,
    head_size=8,
    feed_forward_size=11,
    num_experts=2,
    experts_per_token=1,
    rope_theta=50.0,
    norm_eps=1e-2,
    sliding_window=3,
    max_context=8,
    tied_embeddings=True,
)


PROMPT = [3, 1, 4, 1, 5, 9, 2]
# What these change is the numbers that a model computes; the other fields fix shapes.
MATHEMATICS = {"experts_per_token", "rope_theta", "norm_eps", "sliding_window"}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in parameter_shapes(config, "float32").items()}


def logits(config: ModelConfig) -> np.ndarray:
    """Return the logits [T V] of the prompt; weights are random, and equal for equal shapes."""
    model = model_of(config)
    graph, state = nnx.split(model)
    # Ten times larger weights, for logits that differ by more than rounding.
    model = nnx.merge(graph, jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, state))
    return np.asarray(model(jnp.asarray([PROMPT])))[0]


def test_every_field_has_a_second_value() -> None:
    assert OTHER.keys() == {field.name for field in fields(ModelConfig)}
    assert all(OTHER[name] != value for name, value in asdict(SMALL).items())


@pytest.mark.parametrize("name", sorted(OTHER.keys() - MATHEMATICS - {"max_context"}))
def test_fields_that_fix_shapes_do(name: str) -> None:
    assert shapes(replace(SMALL, **{name: OTHER[name]})) != shapes(SMALL)


@pytest.mark.soak
def test_fields_that_are_mathematics_change_the_logits() -> None:
    before = logits(SMALL)
    for name in sorted(MATHEMATICS):
        changed = replace(SMALL, **{name: OTHER[name]})
        assert shapes(changed) == shapes(SMALL), name
        assert np.abs(logits(changed) - before).max() > 1e-3, name


@pytest.mark.parametrize("max_context", [len(PROMPT), len(PROMPT) - 1])
def test_a_model_knows_how_long_a_context_it_has_room_for(max_context: int) -> None:
    model = model_of(replace(SMALL, max_context=max_context))
    with pytest.raises(ValueError, match=rf"7 tokens.*\b{max_context}\b"):
        list(generate_tokens(model, PROMPT, max_tokens=5))


@pytest.mark.parametrize("field", ["rope_theta", "norm_eps"])
@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0, -1.0])
def test_numbers_that_are_not_positive_and_finite_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field}=.* must be a positive number"):
        replace(SMALL, **{field: value})
