"""PEFT's `adapter_config.json`: what of an adapter's settings is followed, and what is refused.

A field that would change what the adapter computes, and that is not followed here, is an error that
names it. (huggingface/peft 0.21, tuners/lora/config.py; tuners/tuners_utils.py for the matching)
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from mixtral_jax.checkpoint.folder import ADAPTER_CONFIG_FILE
from mixtral_jax.errors import AdapterError, ConfigError
from mixtral_jax.model.adapter import AdapterConfig

CONFIG_FILE = ADAPTER_CONFIG_FILE
_LONGEST = 1 << 20  # bytes; real ones have a few kilobytes
_LARGEST = 1_000_000_000  # of ranks and alphas
_MOST_PATTERNS = 4096
_PATTERN_SECONDS = 0.5  # for one pattern and one name
ALL_LINEAR = "all-linear"
# Fields that are followed.
_FOLLOWED = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "bias",
}
# Fields that say how an adapter was trained or stored, not what it computes.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
}
# Settings whose adapters mean something else, and what to do instead.
_REMEDIES = {
    "use_dora": "DoRA scales whole weights; merge it into the base with PEFT's merge_and_unload, "
    "or train with use_dora=False",
    "lora_bias": "biases of adapters are not supported; train with lora_bias=False",
    "modules_to_save": "whole modules beside the adapter are not supported; merge it into the base "
    "with PEFT's merge_and_unload",
    "trainable_token_indices": "trained embeddings are not supported; merge it into the base with "
    "PEFT's merge_and_unload",
    "fan_in_fan_out": "it is for GPT-2's transposed weights, which these models do not have",
    "layer_replication": "a base with repeated layers is not supported; make it a checkpoint",
    "alora_invocation_tokens": "activated adapters are not supported; train without them",
}
# Starts of `init_lora_weights` that change the base's weights too.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """PEFT's settings of a LoRA adapter.

    `rank_pattern` and `alpha_pattern` replace rank and alpha for the modules that they match;
    `target_modules` is a list of ends of names, or one pattern for whole names.
    """

    path: Path
    base: str
    rank: int
    alpha: float
    rank_stabilized: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | str
    target_parameters: tuple[str, ...]
    exclude_modules: tuple[str, ...] | str
    layers: frozenset[int] | None  # None for all

    @classmethod
    def read(cls, folder: Path) -> "PeftConfig":
        """Reads a folder's `adapter_config.json`.

        Raises AdapterError naming the field for what is not supported, or is no adapter's config.
        """
        path = folder / CONFIG_FILE
        content = _content(path)
        _check(path, content)
        rank_pattern, alpha_pattern = (
            content.get(name) or {} for name in ("rank_pattern", "alpha_pattern")
        )
        for name, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
            if not isinstance(pattern, dict) or len(pattern) > _MOST_PATTERNS:
                raise AdapterError(
                    f"{path}: {name} must be an object of at most {_MOST_PATTERNS} patterns"
                )
            for key, value in pattern.items():
                _number(path, f"{name}[{key!r}]", value, whole=name == "rank_pattern")
        layers = content.get("layers_to_transform")
        if type(layers) is int:
            layers = [layers]
        if layers and not all(type(layer) is int for layer in layers):
            raise AdapterError(f"{path}: layers_to_transform must be whole numbers")
        return cls(
            path=path,
            base=str(content.get("base_model_name_or_path") or ""),
            rank=int(_number(path, "r", content.get("r"), whole=True)),
            alpha=float(_number(path, "lora_alpha", content.get("lora_alpha"), whole=False)),
            rank_stabilized=bool(content.get("use_rslora")),
            rank_pattern=rank_pattern,
            alpha_pattern={key: float(alpha) for key, alpha in alpha_pattern.items()},
            target_modules=_names(path, "target_modules", content),
            target_parameters=tuple(_names(path, "target_parameters", content)),
            exclude_modules=_names(path, "exclude_modules", content),
            layers=frozenset(layers) if layers else None,
        )

    def settings(self, targets: tuple[str, ...]) -> AdapterConfig:
        """These settings as ours, for an adapter that changes the given targets."""
        try:
            return AdapterConfig(
                targets=targets,
                rank=self.rank,
                alpha=self.alpha,
                rank_stabilized=self.rank_stabilized,
            )
        except ConfigError as error:
            raise AdapterError(f"{self.path}: {error}") from error

    def rank_of(self, name: str) -> int:
        """The rank of the module or parameter with the given name."""
        return next((r for key, r in self.rank_pattern.items() if self._fits(key, name)), self.rank)

    def scaling_of(self, name: str) -> float:
        """The factor of B(Ax) for the module or parameter with the given name."""
        patterns = self.alpha_pattern.items()
        alpha = next((a for key, a in patterns if self._fits(key, name)), self.alpha)
        rank = self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def has_module(self, name: str, layer: int) -> bool:
        """Says whether the settings ask for an adapter beside the module with the given name."""
        if self._is_among(self.exclude_modules, name):
            return False
        if not self._is_among(self.target_modules, name):
            return False
        is_whole = isinstance(self.target_modules, str) or name in self.target_modules
        return is_whole or self.layers is None or layer in self.layers

    def has_parameter(self, name: str) -> bool:
        """Says whether the settings ask for an adapter beside the parameter with that name."""
        return self._is_among(self.target_parameters, name)

    def _is_among(self, names: tuple[str, ...] | str, name: str) -> bool:
        if isinstance(names, str):
            return bool(names) and self._matches(names, name)
        return any(name == end or name.endswith(f".{end}") for end in names)

    def _fits(self, pattern: str, name: str) -> bool:
        return self._matches(rf"(.*\.)?({pattern})$", name)

    def _matches(self, pattern: str, name: str) -> bool:
        try:
            return regex.fullmatch(pattern, name, timeout=_PATTERN_SECONDS) is not None
        except (regex.error, TimeoutError) as error:
            raise AdapterError(
                f"{self.path}: {pattern!r} is no pattern that can be matched ({error}); list the "
                "names of the modules instead"
            ) from error


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        inner = path.parent / "adapter"
        hint = "the folder that PEFT's save_pretrained made"
        raise AdapterError(
            f"{path.parent} is no adapter: it has no {path.name}; give "
            f"{inner if (inner / CONFIG_FILE).is_file() else hint}"
        )
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST + 1)
        content = json.loads(text) if len(text) <= _LONGEST else None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path} is no object of at most {_LONGEST} bytes; fetch it again")
    return content


def _check(path: Path, content: Mapping[str, Any]) -> None:
    """Raises AdapterError for the first field that asks for what is not supported."""
    kind = content.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{path}: peft_type is {kind!r}; only LORA adapters can be used")
    task = content.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise AdapterError(f"{path}: task_type is {task!r}; only CAUSAL_LM adapters can be used")
    for name, value in content.items():
        if name in _FOLLOWED or name in _WITHOUT_EFFECT or not value:
            continue
        remedy = _REMEDIES.get(
            name, "its effect is not known here; merge it into the base with PEFT's tools"
        )
        raise AdapterError(f"{path}: {name} is set to {value!r}, which is not supported: {remedy}")
    if content.get("bias") not in (None, "none"):
        raise AdapterError(
            f"{path}: bias is {content['bias']!r}, but the models have no biases; train with "
            'bias="none"'
        )
    is_stabilized = content.get("use_rslora")
    if is_stabilized not in (None, True, False):
        raise AdapterError(f"{path}: use_rslora is {is_stabilized!r}; it must be true or false")
    made = content.get("init_lora_weights")
    if isinstance(made, str) and made.lower().startswith(_CHANGED_BASE):
        raise AdapterError(
            f"{path}: init_lora_weights is {made!r}, which changes the base's weights too; save "
            "the adapter with PEFT's path_initial_model_for_weight_conversion, which makes a plain "
            "one"
        )
    pattern = content.get("layers_pattern")
    if content.get("layers_to_transform") and pattern not in (None, "", [], "layers", ["layers"]):
        raise AdapterError(f"{path}: layers_pattern is {pattern!r}; these models have 'layers'")


def _number(path: Path, name: str, value: Any, whole: bool) -> int | float:
    is_number = type(value) is int or (not whole and type(value) is float and math.isfinite(value))
    if not (is_number and 0 < value <= _LARGEST):
        kind = "whole number" if whole else "number"
        raise AdapterError(
            f"{path}: {name} is {value!r}; it must be a {kind} above 0 and at most {_LARGEST:,}"
        )
    return value


def _names(path: Path, field: str, content: Mapping[str, Any]) -> tuple[str, ...] | str:
    value = content.get(field) or ()
    if isinstance(value, str) and field != "target_parameters":
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise AdapterError(f"{path}: {field} is {value!r}; it must be a list of names")
    return tuple(value)
