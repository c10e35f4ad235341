"""ModelConfig: every number that fixes a shape or the mathematics, and nothing else.

Nothing below the config has a default for what the config owns. Presets carry the figures of the
published `config.json` files, which `mixtral_jax.hf_config` reads and writes.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mixtral_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and mathematics of a decoder.

    Behind each field stand its axis letter and its name in Hugging Face's config.json.
    """

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
            is_number = type(value) in (int, float) and 0 < value <= sys.float_info.max
            if field.type is float and not is_number:
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
        """Say whether feed-forward layers are mixtures of experts."""
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
        """Return the config of Mistral-7B-v0.1 and Mistral-7B-Instruct-v0.1."""
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
        """Return the config of Mistral-7B-Instruct-v0.2."""
        return replace(cls.mistral_7b_v01(), rope_theta=1e6, sliding_window=None)

    @classmethod
    def mistral_7b_instruct_v03(cls) -> "ModelConfig":
        """Return the config of Mistral-7B-v0.3 and Mistral-7B-Instruct-v0.3."""
        return replace(cls.mistral_7b_instruct_v02(), vocab_size=32_768)

    @classmethod
    def mixtral_8x7b_v01(cls) -> "ModelConfig":
        """Return the config of Mixtral-8x7B-v0.1 and Mixtral-8x7B-Instruct-v0.1."""
        return replace(cls.mistral_7b_instruct_v02(), num_experts=8, experts_per_token=2)

    @classmethod
    def mixtral_8x22b_instruct_v01(cls) -> "ModelConfig":
        """Return the config of Mixtral-8x22B-Instruct-v0.1."""
        return replace(
            cls.mixtral_8x7b_v01(),
            vocab_size=32_768,
            hidden_size=6144,
            num_layers=56,
            num_heads=48,
            feed_forward_size=16_384,
            max_context=65_536,
        )

    @classmethod
    def mathstral_7b_v01(cls) -> "ModelConfig":
        """Return the config of Mathstral-7B-v0.1: Mistral-7B-v0.3's, tuned for mathematics."""
        return cls.mistral_7b_instruct_v03()

    @classmethod
    def codestral_22b_v01(cls) -> "ModelConfig":
        """Return the config of Codestral-22B-v0.1, which Mistral-Small-Instruct-2409 shares."""
        return replace(
            cls.mistral_7b_instruct_v03(),
            hidden_size=6144,
            num_layers=56,
            num_heads=48,
            feed_forward_size=16_384,
        )

    @classmethod
    def mistral_small_22b_2409(cls) -> "ModelConfig":
        """Return the config of Mistral-Small-Instruct-2409 (22B)."""
        return cls.codestral_22b_v01()

    @classmethod
    def mistral_nemo_12b_2407(cls) -> "ModelConfig":
        """Return the config of Mistral-Nemo-Base-2407 and Mistral-Nemo-Instruct-2407.

        Heads are smaller than hidden_size / num_heads. The published files say 1,024,000
        positions or, in later revisions and on the model card, 128k, which stands here.
        """
        return replace(
            cls.mistral_7b_instruct_v02(),
            vocab_size=131_072,
            hidden_size=5120,
            num_layers=40,
            head_size=128,
            max_context=131_072,
        )

    @classmethod
    def mistral_small_24b_2501(cls) -> "ModelConfig":
        """Return the config of Mistral-Small-24B-Base-2501 and -Instruct-2501."""
        return replace(
            cls.mistral_nemo_12b_2407(),
            feed_forward_size=32_768,
            rope_theta=1e8,
            max_context=32_768,
        )

    @classmethod
    def smollm2_135m(cls) -> "ModelConfig":
        """Return the config of SmolLM2-135M-Instruct: no window, and small enough for a CPU."""
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
        """Return the config of a toy Mixtral, for tests and first trials."""
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

    # --- config.json of a checkpoint ---

    def to_json(self) -> dict[str, Any]:
        """Return the fields as the checkpoint's config.json holds them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Make a config from the output of `to_json`.

        Raises ConfigError for fields that are unknown, missing or out of range.
        """
        known = {field.name for field in fields(cls)}
        if known != set(values):
            wrong = sorted(known ^ set(values))
            raise ConfigError(f"model config has unknown or missing fields: {', '.join(wrong)}")
        return cls(**values)
