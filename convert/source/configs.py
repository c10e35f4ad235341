"""ModelConfig from the descriptions that are not Hugging Face's: params.json and GGUF metadata.

As with `from_hf`, a field that is not known is refused: ignoring it would make a model
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

    Defaults are those of mistral-inference: rope_theta is 10,000 with a sliding window and a
    million without. The file rarely says for how long a context the model was made; 32,768 then.
    """
    left = dict(params)  # every field is taken out of it; what remains is unknown
    _take_fixed(left, _PARAMS_FIXED)
    left.pop("max_batch_size", None)
    moe = dict(left.pop("moe", None) or {})
    window = left.pop("sliding_window", None)
    if window is not None and type(window) is not int:
        raise ConfigError(f"config field sliding_window={window!r} is not supported")
    theta = left.pop("rope_theta", None) or (1e6 if window is None else 10_000.0)
    contexts = [left.pop(name, None) for name in ("max_position_embeddings", "max_seq_len")]
    heads = _count(left, "n_heads")
    hidden = _count(left, "dim")
    config = ModelConfig(
        vocab_size=_count(left, "vocab_size"),
        hidden_size=hidden,
        num_layers=_count(left, "n_layers"),
        num_heads=heads,
        num_kv_heads=_count(left, "n_kv_heads", heads),
        head_size=_count(left, "head_dim", hidden // heads),
        feed_forward_size=_count(left, "hidden_dim"),
        num_experts=_count(moe, "num_experts") if moe else 0,
        experts_per_token=_count(moe, "num_experts_per_tok") if moe else 0,
        rope_theta=float(theta),
        norm_eps=_number(left, "norm_eps"),
        sliding_window=window,
        max_context=int(contexts[0] or contexts[1] or 32_768),
        tied_embeddings=bool(left.pop("tied_embeddings", False)),
    )
    _refuse(left, "")
    _refuse(moe, "moe.")
    return config


def from_gguf(fields: Mapping[str, Any], *, tied_embeddings: bool) -> ModelConfig:
    """Translates the metadata of a GGUF file of the architecture "llama".

    Args:
        fields: metadata as plain values; other than `llama.*` describe the file.
        tied_embeddings: whether the file lacks a tensor for the head.

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
    if fields.get("split.count", 0) > 1:
        raise ConfigError("split.count: the file is one part of several; merge them first")
    left = {
        name.removeprefix("llama."): value
        for name, value in fields.items()
        if name.startswith("llama.")
    }
    _take_fixed(left, _GGUF_FIXED)
    heads = _count(left, "attention.head_count")
    hidden = _count(left, "embedding_length")
    head_size = _count(left, "attention.key_length", hidden // heads)
    whole_head = {"attention.value_length": (head_size,), "rope.dimension_count": (head_size,)}
    _take_fixed(left, whole_head)
    config = ModelConfig(
        vocab_size=_count(left, "vocab_size", len(fields.get("tokenizer.ggml.tokens", ()))),
        hidden_size=hidden,
        num_layers=_count(left, "block_count"),
        num_heads=heads,
        num_kv_heads=_count(left, "attention.head_count_kv", heads),
        head_size=head_size,
        feed_forward_size=_count(left, "feed_forward_length"),
        num_experts=left.pop("expert_count", 0),
        experts_per_token=left.pop("expert_used_count", 0),
        rope_theta=float(left.pop("rope.freq_base", 10_000.0)),
        norm_eps=_shortest(_number(left, "attention.layer_norm_rms_epsilon")),
        sliding_window=left.pop("attention.sliding_window", 0) or None,
        max_context=_count(left, "context_length"),
        tied_embeddings=tied_embeddings,
    )
    _refuse(left, "llama.")
    return config


def _take_fixed(left: dict[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    """Removes the fields of `fixed`, which may have one of the given values only."""
    for name, supported in fixed.items():
        value = left.pop(name, supported[0])
        if value not in supported:
            wanted = " or ".join(repr(each) for each in supported)
            raise ConfigError(f"config field {name}={value!r} is not supported; only {wanted} is")


def _refuse(left: Mapping[str, Any], prefix: str) -> None:
    for name, value in left.items():
        raise ConfigError(
            f"config field {prefix}{name}={value!r} is not known; refusing to guess whether it "
            "changes the computation"
        )


def _count(left: dict[str, Any], name: str, default: int | None = None) -> int:
    value = left.pop(name, None)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ConfigError(f"config field {name} must be a positive integer, got {value!r}")
    return value


def _number(left: dict[str, Any], name: str) -> float:
    value = left.pop(name, None)
    if not isinstance(value, int | float):
        raise ConfigError(f"config field {name} must be a number, got {value!r}")
    return float(value)


def _shortest(value: float) -> float:
    """GGUF stores f32: 9.999999747378752e-06 there was 1e-05 before."""
    return float(f"{value:.7g}")
