"""Hugging Face's config.json: read as published, written as transformers reads it, or refused."""

import copy
import json
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.hf_config import from_hf, to_hf
from tests.support import parity

# mistralai/Mixtral-8x7B-Instruct-v0.1, the fields of its config.json
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def test_from_hf_reads_the_published_file() -> None:
    assert from_hf(MIXTRAL) == ModelConfig.mixtral_8x7b_v01()


@pytest.mark.parametrize(
    "config", [ModelConfig.mixtral_8x22b_instruct_v01(), ModelConfig.mistral_7b_v01()]
)
def test_to_hf_is_the_inverse_and_transformers_reads_it(config: ModelConfig) -> None:
    hf = to_hf(config, "bfloat16")
    assert from_hf(hf) == config
    theirs = transformers.AutoConfig.for_model(**hf).to_dict()
    assert from_hf(theirs) == config
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "gemma"}, "model_type='gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"logit_softcap": 30.0}, "logit_softcap=30.0 is not known"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling=.*type 'linear' are scaled",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_parameters=.*'yarn'"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "full_attention is not known",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "only a full rotary"),
        ({"rope_parameters": ["default"]}, "must be an object"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number, got '1e-5'"),
        ({"rms_norm_eps": math.inf}, "norm_eps=inf"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is larger than any float64"),
        ({"rope_parameters": {"rope_theta": 10**400}}, r"rope_parameters\.rope_theta is larger"),
        ({"rope_parameters": {"rope_type": None}}, "rope_parameters: its rope_type is null"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"hidden_size": "4096"}, "hidden_size must be a positive integer"),
        ({"vocab_size": None}, "vocab_size must be a positive integer"),
        ({"num_key_value_heads": 5}, "num_heads=32 is not a multiple of num_kv_heads=5"),
        ({"num_experts_per_tok": 9}, "experts_per_token=9"),
        ({"head_dim": 127}, "head_size=127 is odd"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer, got 0"),
        ({"sliding_window": "4096"}, "sliding_window must be a positive integer"),
        ({"max_position_embeddings": "32768"}, "max_position_embeddings must be a positive"),
        ({"num_experts_per_tok": True}, "num_experts_per_tok must be a positive integer"),
    ],
)
def test_what_is_not_computed_is_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        from_hf({**MIXTRAL, **change})


MISTRAL = {**MIXTRAL, "model_type": "mistral"}
for field in ("num_local_experts", "num_experts_per_tok", "rope_theta"):
    del MISTRAL[field]
LLAMA = {**MISTRAL, "model_type": "llama"}
SOURCES = {"mistral": MISTRAL, "mixtral": {**MIXTRAL}, "llama": LLAMA}
del SOURCES["mixtral"]["rope_theta"]


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 500_000}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": None}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {}}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 500_000}}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": None}}, 5e5),
        ({"rope_scaling": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
    ],
)
def test_rope_theta_is_read_wherever_it_stands(
    kind: str, fields: dict[str, Any], theta: float
) -> None:
    hf = {**SOURCES[kind], **fields}
    assert from_hf(hf).rope_theta == theta
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(hf))
    assert theirs.rope_parameters["rope_theta"] == theta


@pytest.mark.parametrize(("kind", "missing"), [("mistral", 8), ("mixtral", 8), ("llama", 32)])
def test_kv_heads_that_are_null_are_as_many_as_heads(kind: str, missing: int) -> None:
    hf = SOURCES[kind]
    assert from_hf({**hf, "num_key_value_heads": None}).num_kv_heads == 32
    without = {name: value for name, value in hf.items() if name != "num_key_value_heads"}
    assert from_hf(without).num_kv_heads == missing


@pytest.mark.parametrize(("kind", "theta"), [("mistral", 1e4), ("mixtral", 1e6), ("llama", 1e4)])
def test_rope_theta_that_is_nowhere_is_the_default_of_transformers(kind: str, theta: float) -> None:
    for fields in ({}, {"rope_theta": None}, {"rope_parameters": {"rope_type": "default"}}):
        assert from_hf({**SOURCES[kind], **fields}).rope_theta == theta
    assert transformers.AutoConfig.for_model(**SOURCES[kind]).rope_parameters["rope_theta"] == theta


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (
            {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 5e5}},
            r"rope_theta=1000000.0, rope_parameters.rope_theta=500000.0 contradict",
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"rope_theta": 5e5}},
            r"rope_theta=1000000.0, rope_scaling.rope_theta=500000.0 contradict",
        ),
        (
            {"rope_parameters": {"rope_theta": None}},
            r"rope_parameters\.rope_theta must be a",
        ),
        ({"rope_parameters": {"rope_theta": "1e6"}}, r"rope_parameters\.rope_theta .* '1e6'"),
        ({"rope_theta": "1e6"}, "rope_theta must be a number, got '1e6'"),
        ({"rope_theta": True}, "rope_theta must be a number, got True"),
        ({"rope_theta": 0}, r"rope_theta=0\.0 must be a positive number"),
        ({"rope_theta": math.nan}, "rope_theta=nan"),
        ({"rope_theta": 10**400}, "rope_theta is larger than any float64"),
    ],
)
@pytest.mark.parametrize("kind", SOURCES)
def test_rope_thetas_that_differ_or_are_no_numbers_are_refused(
    kind: str, fields: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        from_hf({**SOURCES[kind], **fields})


# Fields of config.json as published by Mistral; what is left out equals Mistral-7B-v0.3's.
PUBLISHED: dict[str, tuple[dict[str, Any], ModelConfig]] = {
    "Mistral-Nemo-Instruct-2407": (
        dict(
            head_dim=128,
            hidden_size=5120,
            max_position_embeddings=131_072,
            num_hidden_layers=40,
            vocab_size=131_072,
        ),
        ModelConfig.mistral_nemo_12b_2407(),
    ),
    "Codestral-22B-v0.1": (
        dict(
            hidden_size=6144,
            intermediate_size=16_384,
            num_attention_heads=48,
            num_hidden_layers=56,
        ),
        ModelConfig.codestral_22b_v01(),
    ),
    "Mistral-Small-Instruct-2409": (
        dict(
            head_dim=128,
            hidden_size=6144,
            intermediate_size=16_384,
            num_attention_heads=48,
            num_hidden_layers=56,
        ),
        ModelConfig.mistral_small_22b_2409(),
    ),
    "Mathstral-7B-v0.1": ({}, ModelConfig.mathstral_7b_v01()),
    "Mistral-Small-24B-Instruct-2501": (
        dict(
            head_dim=128,
            hidden_size=5120,
            intermediate_size=32_768,
            num_hidden_layers=40,
            rope_theta=1e8,
            vocab_size=131_072,
        ),
        ModelConfig.mistral_small_24b_2501(),
    ),
}


@pytest.mark.parametrize(("fields", "config"), PUBLISHED.values(), ids=PUBLISHED)
def test_the_family_is_read_as_published(fields: dict[str, Any], config: ModelConfig) -> None:
    assert from_hf({**MISTRAL, "rope_theta": 1e6, "vocab_size": 32_768, **fields}) == config


def shrunk(config: ModelConfig) -> ModelConfig:
    """Return a config of the same proportions, small enough to compute in a test."""
    return replace(
        config,
        vocab_size=config.vocab_size // 256,
        hidden_size=config.hidden_size // 64,
        num_layers=2,
        num_heads=config.num_heads // 8,
        num_kv_heads=config.num_kv_heads // 8,
        head_size=config.head_size // 8,
        feed_forward_size=config.feed_forward_size // 64,
        sliding_window=None if config.sliding_window is None else config.sliding_window // 1024,
        max_context=config.max_context // 512,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=marks)
        for name, config, marks in [
            ("7b", ModelConfig.mistral_7b_v01(), pytest.mark.soak),
            ("mathstral", ModelConfig.mathstral_7b_v01(), pytest.mark.soak),
            ("codestral", ModelConfig.codestral_22b_v01(), pytest.mark.soak),
            # Heads that do not add up to the width of the model; and experts.
            ("nemo", ModelConfig.mistral_nemo_12b_2407(), ()),
            ("small-24b", ModelConfig.mistral_small_24b_2501(), pytest.mark.soak),
            ("8x22b", ModelConfig.mixtral_8x22b_instruct_v01(), ()),
        ]
    ],
)
def test_a_small_twin_computes_what_transformers_does(config: ModelConfig) -> None:
    small = shrunk(config)
    assert (small.num_heads * small.head_size == small.hidden_size) == (
        config.num_heads * config.head_size == config.hidden_size
    )
    hf = transformers.AutoConfig.for_model(**to_hf(small, "float32"), initializer_range=0.2)
    theirs = parity.random_huggingface(hf)
    import torch

    ours = parity.twin(theirs)
    assert ours.config == small
    ids = np.random.default_rng(7).integers(0, small.vocab_size, (2, 12), np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
    assert np.abs(expected).max() > 1  # a model that answers zero would pass
    logits = jax.jit(lambda model, ids: model(ids))(ours, jnp.asarray(ids))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model_type": "ministral"}, "'ministral' is another architecture.* alternate"),
        ({"model_type": "ministral3"}, "'ministral3' is another architecture.*yarn"),
        ({"model_type": "mistral3"}, "'mistral3' is another architecture.* reads images"),
        ({"model_type": "pixtral"}, "'pixtral' is another architecture.* reads images"),
        ({"model_type": "voxtral"}, "'voxtral' is another architecture.* reads sound"),
        ({"vision_config": {}}, "vision_config: the model reads more than text"),
        (
            {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
            "layers that differ in their window are another architecture",
        ),
        ({"layer_types": ["sliding_attention"] * 32}, "all must be 'full_attention'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 16.0}}, "type 'yarn' are scaled"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "type 'llama3' are scaled"),
    ],
)
def test_other_architectures_are_refused_by_name(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        from_hf({**MISTRAL, **fields})


def test_layer_types_that_say_the_same_for_all_layers_are_read() -> None:
    same = {"layer_types": ["full_attention"] * 32, "sliding_window": None}
    assert from_hf({**MISTRAL, **same}).sliding_window is None
    same = {"layer_types": ["sliding_attention"] * 32, "sliding_window": 8}
    assert from_hf({**MISTRAL, **same}).sliding_window == 8
