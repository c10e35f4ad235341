"""Presets hold the published figures; a checkpoint is known by its config file."""

import math
from pathlib import Path

import pytest

from mixtral_jax.checkpoint.parameters import parameter_shapes
from mixtral_jax.config import ModelConfig, is_checkpoint


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (ModelConfig.mistral_7b_v01(), 7_241_732_096),
        (ModelConfig.mistral_7b_instruct_v02(), 7_241_732_096),
        (ModelConfig.mistral_7b_instruct_v03(), 7_248_023_552),
        (ModelConfig.mixtral_8x7b_v01(), 46_702_792_704),
        (ModelConfig.mixtral_8x22b_instruct_v01(), 140_630_071_296),
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


def test_only_our_own_folders_are_checkpoints(tmp_path: Path) -> None:
    assert not is_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    assert not is_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert not is_checkpoint(tmp_path)
