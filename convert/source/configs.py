"""ModelConfig from the descriptions that are not Hugging Face's: params.json and GGUF metadata.

Like `from_hf`, these functions refuse a field that they do not know: ignoring it would make a model
that is silently wrong. Every function here raises ConfigError naming the field.
"""

from collections.abc import Mapping
from typing import Any

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError

# Fields that change what is computed, with the only values that we compute.
_PARAMS_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("transformer",),
    "use_biases": (False, None),
    "use_bias": (False, None),
    "rope_scaling": (None,),
    "yarn": (None,),
    "lora": (None,),
    "quantization": (None,),
    "vision_encoder": (None,),
    "causal": (True,),
}
_GGUF_FIXED: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scale_linear": (1.0,),
    "rope.scaling.factor": (1.0, 0.0),
    "attention.causal": (True,),
}


def from_params(params: Mapping[str, Any]) -> ModelConfig:
    """Translates the content of Mistral's own `params.json`.

    A missing rope_theta is a million, as in mistral-inference since its commit 0e5b458
    (2024-05-22). Before, it was 10,000 where there is a sliding window; today that is right for
    Mistral-7B-v0.1 alone and a guess for any other model, which is refused.

    The file rarely says for how long a context the model was made; 32,768 then.
    """
    remaining = dict(params)  # every field is taken out of it; what remains is unknown
    _take_fixed(remaining, _PARAMS_FIXED)
    remaining.pop("max_batch_size", None)
    moe = remaining.pop("moe", None) or {}
    if not isinstance(moe, Mapping):
        raise ConfigError(f"config field moe={moe!r} is not supported; it must be an object")
    moe = dict(moe)
    window = remaining.pop("sliding_window", None)
    if window is not None and type(window) is not int:
        raise ConfigError(f"config field sliding_window={window!r} is not supported")
    theta = _number(remaining, "rope_theta", 0.0) or _default_theta(params, window)
    contexts = [
        _count(remaining, name, 0, least=0) for name in ("max_position_embeddings", "max_seq_len")
    ]
    heads = _count(remaining, "n_heads")
    hidden = _count(remaining, "dim")
    config = ModelConfig(
        vocab_size=_count(remaining, "vocab_size"),
        hidden_size=hidden,
        num_layers=_count(remaining, "n_layers"),
        num_heads=heads,
        num_kv_heads=_count(remaining, "n_kv_heads", heads),
        head_size=_count(remaining, "head_dim", hidden // heads),
        feed_forward_size=_count(remaining, "hidden_dim"),
        num_experts=_count(moe, "num_experts") if moe else 0,
        experts_per_token=_count(moe, "num_experts_per_tok") if moe else 0,
        rope_theta=theta,
        norm_eps=_number(remaining, "norm_eps"),
        sliding_window=window,
        max_context=contexts[0] or contexts[1] or 32_768,
        tied_embeddings=_flag(remaining, "tied_embeddings"),
    )
    _refuse(remaining, "")
    _refuse(moe, "moe.")
    return config


def from_gguf(fields: Mapping[str, Any], *, tied_embeddings: bool) -> ModelConfig:
    """Translates the metadata of a GGUF file of the architecture "llama".

    Args:
        fields: metadata as plain values; other than `llama.*` describe the file.
        tied_embeddings: true if the file lacks a tensor for the head.

    llama.cpp has no sliding window for this architecture and its files do not say that
    Mistral-7B-v0.1 has one: convert that model from safetensors if contexts exceed 4,096 tokens.
    """
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"general.architecture={architecture!r} is not supported; only 'llama' is, which is "
            "what Mistral and Mixtral are called there"
        )
    if fields.get("general.type", "model") != "model":
        raise ConfigError(f"general.type={fields['general.type']!r} is not supported; give a model")
    if fields.get("split.count", 0) not in (0, 1):
        raise ConfigError("split.count: the file is one part of several; merge them first")
    remaining = {
        name.removeprefix("llama."): value
        for name, value in fields.items()
        if name.startswith("llama.")
    }
    _take_fixed(remaining, _GGUF_FIXED)
    heads = _count(remaining, "attention.head_count")
    hidden = _count(remaining, "embedding_length")
    head_size = _count(remaining, "attention.key_length", hidden // heads)
    whole_head = {"attention.value_length": (head_size,), "rope.dimension_count": (head_size,)}
    _take_fixed(remaining, whole_head)
    config = ModelConfig(
        vocab_size=_count(remaining, "vocab_size", _num_tokens(fields)),
        hidden_size=hidden,
        num_layers=_count(remaining, "block_count"),
        num_heads=heads,
        num_kv_heads=_count(remaining, "attention.head_count_kv", heads),
        head_size=head_size,
        feed_forward_size=_count(remaining, "feed_forward_length"),
        num_experts=_count(remaining, "expert_count", 0, least=0),
        experts_per_token=_count(remaining, "expert_used_count", 0, least=0),
        rope_theta=_number(remaining, "rope.freq_base", 10_000.0),
        norm_eps=_undo_float32_rounding(_number(remaining, "attention.layer_norm_rms_epsilon")),
        sliding_window=_count(remaining, "attention.sliding_window", 0, least=0) or None,
        max_context=_count(remaining, "context_length"),
        tied_embeddings=tied_embeddings,
    )
    _refuse(remaining, "llama.")
    return config


# The numbers of Mistral-7B-v0.1 that its params.json has.
_MISTRAL_7B_V01 = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14_336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 32_000,
    "sliding_window": 4096,
}


def _default_theta(params: Mapping[str, Any], window: int | None) -> float:
    """Returns the rope_theta of a file that does not have one."""
    if window is None:
        return 1e6
    is_v01 = all(params.get(name) == value for name, value in _MISTRAL_7B_V01.items())
    if is_v01 and not params.get("moe"):
        return 10_000.0
    raise ConfigError(
        f"config field rope_theta is missing beside sliding_window={window}; add it: 10000.0 as "
        "in Mistral-7B-v0.1, or what the model was trained with"
    )


def _take_fixed(remaining: dict[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    """Removes the fields of `fixed`, which may have one of the given values only."""
    for name, supported in fixed.items():
        value = remaining.pop(name, supported[0])
        if value not in supported:
            wanted = " or ".join(map(repr, supported))
            raise ConfigError(f"config field {name}={value!r} is not supported; only {wanted} is")


def _refuse(remaining: Mapping[str, Any], prefix: str) -> None:
    for name, value in remaining.items():
        raise ConfigError(
            f"config field {prefix}{name}={value!r} is not known; refusing to guess whether it "
            "changes the computation"
        )


def _count(
    remaining: dict[str, Any], name: str, default: int | None = None, *, least: int = 1
) -> int:
    value = remaining.pop(name, None)
    value = default if value is None else value
    if type(value) is not int or value < least:
        kind = "a positive integer" if least else "an integer of 0 or more"
        raise ConfigError(f"config field {name} must be {kind}, got {value!r}")
    return value


def _number(remaining: dict[str, Any], name: str, default: float | None = None) -> float:
    value = remaining.pop(name, None)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"config field {name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"config field {name} is larger than any float64; correct it") from None


def _flag(remaining: dict[str, Any], name: str) -> bool:
    value = remaining.pop(name, False)
    if not isinstance(value, bool):
        raise ConfigError(f"config field {name} must be true or false, got {value!r}")
    return value


def _num_tokens(fields: Mapping[str, Any]) -> int | None:
    tokens = fields.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else None


def _undo_float32_rounding(value: float) -> float:
    """Returns the decimal number that was written before GGUF stored it as float32.

    For example 1e-05 for 9.999999747378752e-06.
    """
    return float(f"{value:.7g}")
