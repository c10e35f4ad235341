"""Rows of several adapters under meshes of virtual devices are what they are on one device."""

from dataclasses import replace

import numpy as np
import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.model.adapter_stack import NO_SLOT, StackSizes
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.sharding import copies_of, make_mesh
from mixtral_jax.step.buckets import compile_buckets
from mixtral_jax.step.draws import unpack
from mixtral_jax.step.inputs import GroupInputs, StepSizes
from mixtral_jax.step.launcher import StepLauncher
from tests.support.adapters import random_adapter
from tests.support.models import model_of, split_over

MOE = replace(
    ModelConfig.tiny(vocab_size=64),
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_size=8,
    num_experts=4,
    sliding_window=None,
)
DENSE = replace(MOE, num_experts=0, experts_per_token=0)
SETTINGS = {
    0: AdapterConfig(rank=4, alpha=8.0),
    2: AdapterConfig(targets=("o", "gate", "down"), rank=2, alpha=8.0),
}
SLOTS = [0, NO_SLOT, 2, 0]


def launched(model: Transformer, tokens: int) -> np.ndarray:
    """The likeliest tokens' logprobs behind four prompts, each group of sequences having them."""
    sizes = StepSizes(num_pages=4 * 16, page_size=4, max_sequences=4, max_context=64)
    stacks = StackSizes.all_targets(model.config, slots=3, rank=4)
    steps = compile_buckets(model, sizes, {tokens: 4}, has_masks=False, adapters=stacks)
    launcher = StepLauncher(model, steps)
    for slot, settings in SETTINGS.items():
        adapter = random_adapter(model.config, settings, seed=slot, size=0.3)
        launcher.put_adapter(slot, adapter.folded(settings))
    inputs = launcher.steps.blank(tokens)
    drawn = np.random.default_rng(0)
    for group in range(steps.num_sequence_groups):
        writer = GroupInputs(inputs, group, 4)
        for row, slot in enumerate(SLOTS):
            ids = drawn.integers(0, 64, tokens // 4).tolist() if group == 0 else [row + 1] * 2
            at = writer.add(ids, 0, list(range(row * 16, row * 16 + 16)), slot=slot)
            sampling = SamplingParams(temperature=0.0, top_logprobs=20)
            writer.sample(at, sampling, seed=0, position=len(ids), prompt_length=len(ids))
    return unpack(np.asarray(launcher.launch(inputs).packed)).top_logprobs


@pytest.mark.parametrize(
    ("config", "shape", "dp_attention", "tokens"),
    [
        pytest.param(MOE, (2, 2, 2), False, 16, id="moe-heads"),
        pytest.param(MOE, (1, 4, 1), True, 16, id="moe-sequences"),
        pytest.param(MOE, (1, 4, 2), True, 64, id="moe-exchanged", marks=pytest.mark.soak),
        pytest.param(DENSE, (2, 2, 2), False, 16, id="dense-heads", marks=pytest.mark.soak),
        pytest.param(DENSE, (1, 4, 2), True, 16, id="dense-sequences", marks=pytest.mark.soak),
    ],
)
def test_a_mesh_gives_what_one_device_gives(
    config: ModelConfig, shape: tuple[int, int, int], dp_attention: bool, tokens: int
) -> None:
    model = model_of(config)
    mesh = make_mesh(*shape, copies=copies_of(config, shape[1], shape[2], dp_attention))
    want = launched(model, tokens)
    got = launched(split_over(model, mesh, dp_attention), tokens)
    np.testing.assert_allclose(got[: len(SLOTS)], want, rtol=0, atol=2e-5)
    assert np.abs(want[0] - want[1]).max() > 1e-3
