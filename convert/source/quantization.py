"""Fields of a `quantization_config`: those that mean something are checked, others are refused."""

from collections.abc import Collection, Mapping
from typing import Any

from mixtral_jax.errors import ConfigError

REMEDY = (
    "fetch the model's bf16 weights, or one of the forms that are read: FP8 (e4m3), GPTQ, AWQ, "
    "compressed-tensors' integers of 4 or 8 bits"
)
# Fields that say nothing about what the tensors mean, or that the tensors say themselves.
_SILENT = frozenset(
    {
        *("ignore", "ignored_layers", "modules_to_not_convert", "global_compression_ratio"),
        *("quantization_status", "version", "quant_method", "is_checkpoint_fp8_serialized"),
        "dequantize",
    }
)


def check_fields(
    fields: Mapping[str, Any],
    fixed: Mapping[str, tuple[Any, ...]],
    read: Collection[str] = (),
    prefix: str = "",
) -> None:
    """Raises ConfigError for a field that is not known, or whose value is not one of `fixed`.

    `read` are the fields that the caller reads; `prefix` is before their names in errors.
    """
    for name, value in fields.items():
        if name in fixed:
            if not is_among(value, fixed[name]):
                raise unsupported(prefix + name, value)
        elif name not in _SILENT and name not in read:
            raise unsupported(prefix + name, value)


def is_among(value: Any, known: Collection[Any]) -> bool:
    """Says whether a value is one of `known`, of the same type too: 4.0 is not 4, nor True 1."""
    return any(type(value) is type(other) and value == other for other in known)


def unsupported(name: str, value: Any) -> ConfigError:
    """The error for a field of `quantization_config` that cannot be read."""
    return ConfigError(
        f"config field quantization_config.{name}={value!r} is not supported; {REMEDY}"
    )
