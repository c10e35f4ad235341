"""Hugging Face's `config.json`, read into a ModelConfig and written from one.

`from_hf` refuses every field that it does not know: a field that is ignored is a model that is
silently wrong.
"""

from collections.abc import Mapping
from typing import Any

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError

# Defaults of the config classes of transformers, for fields that a file leaves out.
_KV_HEADS = {"mistral": 8, "mixtral": 8, "llama": None}
_ROPE_THETA = {"mistral": 10_000.0, "mixtral": 1e6, "llama": 10_000.0}
_MISTRAL_EPS = {"mistral": 1e-6, "mixtral": 1e-5}
_MAX_POSITIONS = {"mistral": 4096 * 32, "mixtral": 4096 * 32, "llama": 2048}

# Fields that change what is computed, with the only values that we compute.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, 0, None),
    "router_jitter_noise": (0.0, 0, None),
    "rope_scaling": (None,),
    "pretraining_tp": (1, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "quantization_config": (None,),
    "use_sliding_window": (True, None),
    "partial_rotary_factor": (1.0, 1, None),
    "is_decoder": (False, True, None),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": (None, {}),
    "rope_interleaved": (False, None),
}
# Fields that say nothing about the forward computation.
_SILENT = frozenset(
    """
    architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id id2label
    initializer_range label2id model_type name_or_path _name_or_path output_attentions
    output_hidden_states output_router_logits pad_token_id problem_type return_dict
    router_aux_loss_coef tokenizer_class torch_dtype transformers_version unsloth_fixed
    unsloth_version use_cache transformers.js_config is_llama_config _attn_implementation_autoset
    """.split()  # noqa: SIM905
)
_SHAPE = frozenset(
    """
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size rope_theta rope_parameters rms_norm_eps sliding_window
    max_position_embeddings tie_word_embeddings
    """.split()  # noqa: SIM905
)
_MOE = frozenset({"num_local_experts", "num_experts_per_tok"})


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Translates the content of a Hugging Face `config.json`.

    Takes `mistral`, `mixtral`, and those `llama` configs that compute the same thing (no
    biases, no rope scaling). Raises ConfigError naming the field and its value otherwise.
    """
    kind = hf.get("model_type")
    if kind not in ("mistral", "mixtral", "llama"):
        raise ConfigError(
            f"model_type={kind!r} is not supported; use a mistral, mixtral or llama model"
        )
    _refuse_unknown(hf, kind)
    heads = _required(hf, "num_attention_heads")
    hidden = _required(hf, "hidden_size")
    return ModelConfig(
        vocab_size=_required(hf, "vocab_size"),
        hidden_size=hidden,
        num_layers=_required(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_optional(hf, "num_key_value_heads", _KV_HEADS[kind] or heads),
        head_size=_optional(hf, "head_dim", hidden // heads),
        feed_forward_size=_required(hf, "intermediate_size"),
        num_experts=_optional(hf, "num_local_experts", 8) if kind == "mixtral" else 0,
        experts_per_token=_optional(hf, "num_experts_per_tok", 2) if kind == "mixtral" else 0,
        rope_theta=_rope_theta(hf, _ROPE_THETA[kind]),
        norm_eps=_optional(hf, "rms_norm_eps", 1e-6 if kind == "llama" else _MISTRAL_EPS[kind]),
        # A mistral config without the key means transformers' class default of 4096; null
        # means no window.
        sliding_window=hf.get("sliding_window", 4096 if kind == "mistral" else None),
        max_context=_optional(hf, "max_position_embeddings", _MAX_POSITIONS[kind]),
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that transformers reads for this model; inverse of `from_hf`."""
    kind = "mixtral" if config.is_moe else "mistral"
    hf: dict[str, Any] = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.feed_forward_size,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "sliding_window": config.sliding_window,
        "max_position_embeddings": config.max_context,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": dtype,
    }
    if config.is_moe:
        hf["num_local_experts"] = config.num_experts
        hf["num_experts_per_tok"] = config.experts_per_token
    return hf


def _refuse_unknown(hf: Mapping[str, Any], kind: str) -> None:
    for name, value in hf.items():
        if name in _FIXED:
            if value not in _FIXED[name]:
                raise ConfigError(
                    f"config field {name}={value!r} is not supported; only "
                    f"{' or '.join(repr(v) for v in _FIXED[name])} is"
                )
        elif name in _MOE and kind == "mixtral":
            continue
        elif name == "sliding_window" and kind == "llama" and value is not None:
            raise ConfigError(f"config field sliding_window={value!r} has no meaning for llama")
        elif name not in _SHAPE and name not in _SILENT:
            raise ConfigError(
                f"config field {name}={value!r} is not known; refusing to guess whether it "
                "changes the computation"
            )


def _required(hf: Mapping[str, Any], name: str) -> int:
    value = hf.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config field {name} must be a positive integer, got {value!r}")
    return value


def _optional(hf: Mapping[str, Any], name: str, default: Any) -> Any:
    value = hf.get(name)
    return default if value is None else value


def _rope_theta(hf: Mapping[str, Any], default: float) -> float:
    """transformers 5 moved `rope_theta` into `rope_parameters`; older files have it at the root."""
    rope = hf.get("rope_parameters")
    if rope is None:
        return float(_optional(hf, "rope_theta", default))
    unknown = set(rope) - {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    if unknown or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ConfigError(f"config field rope_parameters={rope!r} is not supported")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"config field rope_parameters={rope!r}: only a full rotary is supported")
    return float(rope.get("rope_theta", default))
