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
_NORM_EPS = {"mistral": 1e-6, "mixtral": 1e-5, "llama": 1e-6}
_MAX_POSITIONS = {"mistral": 4096 * 32, "mixtral": 4096 * 32, "llama": 2048}

# Other architectures that Mistral publishes, with the part that is not computed here.
_OTHER_ARCHITECTURES = {
    "ministral": "layers with a sliding window alternate with layers that see all keys",
    "ministral3": "its rotary embedding is scaled (yarn), and queries are scaled by position",
    "mistral3": "it reads images (Mistral-Small 3.1 and later)",
    "mistral4": "its attention compresses keys and values (multi-head latent attention)",
    "mistral_large4": "its attention compresses keys and values (multi-head latent attention)",
    "pixtral": "it reads images",
    "voxtral": "it reads sound",
    "voxtral_realtime": "it reads sound",
}
# Fields that change what is computed, with the only values that we compute.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, 0, None),
    "router_jitter_noise": (0.0, 0, None),
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
    intermediate_size rope_theta rope_parameters rope_scaling rms_norm_eps sliding_window
    max_position_embeddings tie_word_embeddings
    """.split()  # noqa: SIM905
)
_MOE = frozenset({"num_local_experts", "num_experts_per_tok"})


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Translate the content of a Hugging Face `config.json`.

    It takes `mistral`, `mixtral`, and those `llama` configs that compute the same thing (no
    biases, no rope scaling). Raises ConfigError naming the field and its value otherwise.
    """
    kind = hf.get("model_type")
    if (reason := _OTHER_ARCHITECTURES.get(str(kind))) is not None:
        raise ConfigError(
            f"model_type={kind!r} is another architecture than mistral and mixtral: {reason}"
        )
    if kind not in ("mistral", "mixtral", "llama"):
        raise ConfigError(
            f"model_type={kind!r} is not supported; use a mistral, mixtral or llama model"
        )
    _refuse_unknown(hf, kind)
    heads = _count(hf, "num_attention_heads")
    hidden = _count(hf, "hidden_size")
    is_moe = kind == "mixtral"
    return ModelConfig(
        vocab_size=_count(hf, "vocab_size"),
        hidden_size=hidden,
        num_layers=_count(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_num_kv_heads(hf, kind, heads),
        head_size=_count(hf, "head_dim", hidden // heads),
        feed_forward_size=_count(hf, "intermediate_size"),
        num_experts=_count(hf, "num_local_experts", 8) if is_moe else 0,
        experts_per_token=_count(hf, "num_experts_per_tok", 2) if is_moe else 0,
        rope_theta=_rope_theta(hf, _ROPE_THETA[kind]),
        norm_eps=_number("rms_norm_eps", _optional(hf, "rms_norm_eps", _NORM_EPS[kind])),
        sliding_window=_sliding_window(hf, kind),
        max_context=_count(hf, "max_position_embeddings", _MAX_POSITIONS[kind]),
        tied_embeddings=_flag(hf, "tie_word_embeddings"),
    )


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the content of the `config.json` of this model; the inverse of `from_hf`."""
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
        elif name == "layer_types":
            _check_layer_types(hf, kind)
        elif name in ("text_config", "vision_config", "audio_config"):
            raise ConfigError(
                f"config field {name}: the model reads more than text, which is another "
                "architecture; only models of text are supported"
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


def _check_layer_types(hf: Mapping[str, Any], kind: str) -> None:
    """Raise ConfigError unless all layers have the window that `sliding_window` says."""
    types = hf["layer_types"]
    window = _sliding_window(hf, kind)
    expected = "full_attention" if window is None else "sliding_attention"
    if types is not None and (
        not isinstance(types, list) or any(name != expected for name in types)
    ):
        raise ConfigError(
            f"config field layer_types={types!r} is not supported: layers that differ in their "
            "window are another architecture (Ministral); with this sliding_window all must be "
            f"{expected!r}"
        )


def _count(hf: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = _optional(hf, name, default)
    if type(value) is not int or value < 1:
        raise ConfigError(f"config field {name} must be a positive integer, got {value!r}")
    return value


def _num_kv_heads(hf: Mapping[str, Any], kind: str, heads: int) -> int:
    """Return the number of key-value heads; null means `heads`, as in transformers' classes."""
    is_missing = "num_key_value_heads" not in hf
    return _count(hf, "num_key_value_heads", _KV_HEADS[kind] or heads if is_missing else heads)


def _optional(hf: Mapping[str, Any], name: str, default: Any) -> Any:
    value = hf.get(name)
    return default if value is None else value


def _sliding_window(hf: Mapping[str, Any], kind: str) -> int | None:
    """Return the window; null is none, and a mistral config without the field means 4096."""
    if "sliding_window" not in hf:
        return 4096 if kind == "mistral" else None
    return None if hf["sliding_window"] is None else _count(hf, "sliding_window")


def _rope_theta(hf: Mapping[str, Any], default: float) -> float:
    """Return the base of the rotary embedding, wherever the file has it.

    Files have `rope_theta` at the root; transformers 5 writes it into `rope_parameters`, which it
    also calls `rope_scaling`, and takes the root's where it lacks one.
    """
    stated = {}
    if (root := hf.get("rope_theta")) is not None:
        stated["rope_theta"] = _number("rope_theta", root)
    for name in ("rope_parameters", "rope_scaling"):
        rope = hf.get(name)
        if rope is None:
            continue
        _refuse_other_rope(name, rope)
        if "rope_theta" in rope:
            field = f"{name}.rope_theta"
            stated[field] = _number(field, rope["rope_theta"])
    if len(set(stated.values())) > 1:
        values = ", ".join(f"{field}={value!r}" for field, value in stated.items())
        raise ConfigError(f"config fields {values} contradict each other; remove the wrong one")
    return next(iter(stated.values()), default)


def _refuse_other_rope(name: str, rope: Any) -> None:
    """Raise ConfigError unless `rope` describes the plain rotary embedding of whole heads."""
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config field {name}={rope!r} must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind is None:  # transformers 5 looks up an embedding of type None, and fails
        raise ConfigError(f"config field {name}: its rope_type is null; write 'default' or no type")
    if kind != "default":
        raise ConfigError(
            f"config field {name}={dict(rope)!r} is not supported: rotary embeddings of type "
            f"{kind!r} are scaled for longer contexts, and only unscaled ones are computed"
        )
    unknown = set(rope) - {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    if unknown:
        raise ConfigError(
            f"config field {name}={dict(rope)!r} is not supported: {', '.join(sorted(unknown))} "
            "is not known"
        )
    if _optional(rope, "partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"config field {name}={dict(rope)!r}: only a full rotary is supported")


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise ConfigError(f"config field {name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"config field {name} is larger than any float64; correct it") from None


def _flag(hf: Mapping[str, Any], name: str) -> bool:
    value = _optional(hf, name, False)
    if not isinstance(value, bool):
        raise ConfigError(f"config field {name} must be true or false, got {value!r}")
    return value
