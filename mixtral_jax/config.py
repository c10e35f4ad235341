"""ModelConfig: every number that fixes a shape or the mathematics, and nothing else.

Nothing below the config has a default for what the config owns. Presets carry the figures of the
published `config.json` files; `from_hf` translates such a file and refuses every field it does not
know, because a field that is ignored is a model that is silently wrong.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mixtral_jax.errors import ConfigError

CONFIG_FILE = "config.json"
FORMAT = "mixtral-jax/1"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and mathematics of one decoder. Field names on the right are Hugging Face's."""

    vocab_size: int
    hidden_size: int  # D
    num_layers: int  # num_hidden_layers
    num_heads: int  # N, num_attention_heads
    num_kv_heads: int  # K, num_key_value_heads
    head_size: int  # H, head_dim
    feed_forward_size: int  # F, intermediate_size
    num_experts: int  # E, num_local_experts; 0 is a dense model
    experts_per_token: int  # X, num_experts_per_tok; 0 in a dense model
    rope_theta: float
    norm_eps: float  # rms_norm_eps
    sliding_window: int | None  # keys a query sees, itself included; None sees all
    max_context: int  # max_position_embeddings
    tied_embeddings: bool  # tie_word_embeddings

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("num_experts", "experts_per_token") else 1
            if field.type is int and (type(value) is not int or value < least):
                raise ConfigError(f"{field.name}={value!r} must be an integer of at least {least}")
            if field.type is float and (type(value) not in (int, float) or not value > 0):
                raise ConfigError(f"{field.name}={value!r} must be a positive number")
        if self.sliding_window is not None and type(self.sliding_window) is not int:
            raise ConfigError(f"sliding_window={self.sliding_window!r} must be an integer or null")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_size % 2:
            raise ConfigError(f"head_size={self.head_size} is odd; rotary embedding needs pairs")
        if not 0 <= self.experts_per_token <= self.num_experts:
            raise ConfigError(
                f"experts_per_token={self.experts_per_token} is not within "
                f"num_experts={self.num_experts}"
            )
        if (self.num_experts == 0) != (self.experts_per_token == 0):
            raise ConfigError("num_experts and experts_per_token must be zero together")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window={self.sliding_window} must be at least 1, or null")

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Size of every axis letter (axes.py) that a parameter can have."""
        return {
            "D": self.hidden_size,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_size,
            "F": self.feed_forward_size,
            "E": self.num_experts,
            "Q": self.num_experts,
            "V": self.vocab_size,
        }

    # --- presets: huggingface.co/mistralai/<name>/config.json ---

    @classmethod
    def mistral_7b_v01(cls) -> "ModelConfig":
        """Mistral-7B-v0.1 and Mistral-7B-Instruct-v0.1."""
        return cls(
            vocab_size=32_000,
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_size=128,
            feed_forward_size=14_336,
            num_experts=0,
            experts_per_token=0,
            rope_theta=10_000.0,
            norm_eps=1e-5,
            sliding_window=4096,
            max_context=32_768,
            tied_embeddings=False,
        )

    @classmethod
    def mistral_7b_instruct_v02(cls) -> "ModelConfig":
        return cls._with(cls.mistral_7b_v01(), rope_theta=1e6, sliding_window=None)

    @classmethod
    def mistral_7b_instruct_v03(cls) -> "ModelConfig":
        return cls._with(cls.mistral_7b_instruct_v02(), vocab_size=32_768)

    @classmethod
    def mixtral_8x7b_v01(cls) -> "ModelConfig":
        """Mixtral-8x7B-v0.1 and Mixtral-8x7B-Instruct-v0.1."""
        return cls._with(cls.mistral_7b_instruct_v02(), num_experts=8, experts_per_token=2)

    @classmethod
    def mixtral_8x22b_instruct_v01(cls) -> "ModelConfig":
        return cls._with(
            cls.mixtral_8x7b_v01(),
            vocab_size=32_768,
            hidden_size=6144,
            num_layers=56,
            num_heads=48,
            feed_forward_size=16_384,
            max_context=65_536,
        )

    @classmethod
    def smollm2_135m(cls) -> "ModelConfig":
        """SmolLM2-135M-Instruct: Mistral's mathematics without a window, small enough for a CPU."""
        return cls(
            vocab_size=49_152,
            hidden_size=576,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            head_size=64,
            feed_forward_size=1536,
            num_experts=0,
            experts_per_token=0,
            rope_theta=100_000.0,
            norm_eps=1e-5,
            sliding_window=None,
            max_context=8192,
            tied_embeddings=True,
        )

    @classmethod
    def tiny(cls, *, vocab_size: int) -> "ModelConfig":
        """A toy Mixtral with random weights, for tests and for trying the plumbing."""
        return cls(
            vocab_size=vocab_size,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_size=16,
            feed_forward_size=96,
            num_experts=4,
            experts_per_token=2,
            rope_theta=10_000.0,
            norm_eps=1e-5,
            sliding_window=64,
            max_context=512,
            tied_embeddings=False,
        )

    @classmethod
    def _with(cls, config: "ModelConfig", **changes: Any) -> "ModelConfig":
        return cls(**{**asdict(config), **changes})

    # --- Hugging Face's config.json ---

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
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
        return cls(
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

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers reads for this model; inverse of `from_hf`."""
        kind = "mixtral" if self.is_moe else "mistral"
        hf: dict[str, Any] = {
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "model_type": kind,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.feed_forward_size,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "sliding_window": self.sliding_window,
            "max_position_embeddings": self.max_context,
            "tie_word_embeddings": self.tied_embeddings,
            "torch_dtype": dtype,
        }
        if self.is_moe:
            hf["num_local_experts"] = self.num_experts
            hf["num_experts_per_tok"] = self.experts_per_token
        return hf

    # --- our own file ---

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModelConfig":
        known = {field.name for field in fields(cls)}
        if known != set(values):
            wrong = sorted(known ^ set(values))
            raise ConfigError(f"model config has unknown or missing fields: {', '.join(wrong)}")
        return cls(**values)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of ours, by its config file."""
    try:
        content = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


# What transformers' config classes assume where a file leaves the field out.
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
