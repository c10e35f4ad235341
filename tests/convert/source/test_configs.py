"""Configs of params.json and of GGUF metadata; what is not known in them is refused."""

from typing import Any

import numpy as np
import pytest

from convert.source.configs import from_gguf, from_params
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.hf_config import from_hf
from tests.support import sources

DENSE = from_hf(sources.DENSE)


MOE = from_hf(sources.MOE)


def test_params_say_the_same_as_the_config() -> None:
    assert from_params(sources.PARAMS) == DENSE
    assert from_params(sources.MOE_PARAMS) == MOE
    # As published beside consolidated.safetensors: rope_theta only where it is not the default.
    published = dict(dim=4096, n_layers=32, head_dim=128, hidden_dim=14_336, n_heads=32)
    published |= dict(n_kv_heads=8, norm_eps=1e-5)
    windowed = from_params(published | dict(vocab_size=32_000, sliding_window=4096))
    assert windowed == ModelConfig.mistral_7b_v01()
    assert from_params(published | dict(vocab_size=32_768)) == ModelConfig.mistral_7b_instruct_v03()


@pytest.mark.parametrize(
    "field, value",
    [
        ("rope_scaling", {"factor": 8.0}),
        ("quantization", {"qformat_weight": "fp8_e4m3"}),
        ("model_type", "mamba"),
        ("sliding_window", [5, 7]),
        ("moe", {"num_experts": 3, "num_experts_per_tok": 2, "num_shared_experts": 1}),
        ("n_heads", None),
        ("norm_eps", "small"),
        ("moe", 3),
        ("moe", [8, 2]),
        ("rope_theta", "1e6"),
        ("rope_theta", 10**400),
        ("norm_eps", 10**400),
        ("rope_theta", [1e6]),
        ("rope_theta", True),
        ("max_seq_len", "long"),
        ("max_position_embeddings", 4096.5),
        ("tied_embeddings", "yes"),
        ("brand_new", 1),
    ],
)
def test_params_that_are_refused(field: str, value: Any) -> None:
    is_object = isinstance(value, dict) and field == "moe"
    with pytest.raises(ConfigError, match="num_shared_experts" if is_object else field):
        from_params(sources.PARAMS | {field: value})


@pytest.mark.parametrize(
    "change",
    [
        dict(n_layers=40),
        dict(dim=5120),
        dict(vocab_size=32_768),
        dict(sliding_window=8192),
        dict(moe=dict(num_experts=8, num_experts_per_tok=2)),
        dict(rope_theta=None, hidden_dim=8192),
    ],
)
def test_a_window_without_a_theta_is_refused_but_in_mistral_7b_v01(change: dict[str, Any]) -> None:
    """mistral-inference took 10,000 for it until its commit 0e5b458, and takes a million since."""
    published = dict(dim=4096, n_layers=32, head_dim=128, hidden_dim=14_336, n_heads=32)
    published |= dict(n_kv_heads=8, norm_eps=1e-5, vocab_size=32_000, sliding_window=4096)
    assert from_params(published).rope_theta == 10_000.0
    with pytest.raises(ConfigError, match="rope_theta is missing beside sliding_window"):
        from_params(published | change)
    assert from_params(published | change | dict(rope_theta=5e5)).rope_theta == 5e5


SMOLLM2 = {
    "general.architecture": "llama",
    "general.name": "whatever",
    "tokenizer.ggml.model": "gpt2",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100_000.0,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.vocab_size": 49_152,
    "llama.rope.dimension_count": 64,
}


def test_gguf_metadata() -> None:
    assert from_gguf(SMOLLM2, tied_embeddings=True) == ModelConfig.smollm2_135m()


@pytest.mark.parametrize(
    "field, value",
    [
        ("general.architecture", "qwen2"),
        ("general.type", "adapter"),
        ("split.count", 3),
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.dimension_count", 32),
        ("llama.attention.head_count_kv", [3, 1]),
        ("split.count", "three"),
        ("llama.rope.freq_base", "high"),
        ("llama.rope.freq_base", 10**400),
        ("llama.rope.freq_base", [1e4]),
        ("llama.expert_count", "8"),
        ("llama.expert_used_count", [2]),
        ("llama.attention.sliding_window", "wide"),
        ("llama.attention.layer_norm_rms_epsilon", False),
        ("llama.brand_new", 1),
    ],
)
def test_gguf_metadata_that_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field.removeprefix("llama.")):
        from_gguf(SMOLLM2 | {field: value}, tied_embeddings=True)
