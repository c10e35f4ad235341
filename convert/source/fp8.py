"""FP8 weights as others publish them: the schemes that are read, and the scales of each tensor.

    compressed-tensors   llm-compressor's folders (RedHatAI, neuralmagic), format float-quantized:
                         `weight` with `weight_scale`, for a tensor [1], for outputs [O 1] or for
                         blocks [O/128 I/128]; `input_scale` where activations have static scales
    fp8                  AutoFP8: the same names; DeepSeek's and transformers' folders:
                         `weight_scale_inv` for blocks or a tensor, `activation_scale`
    Mistral's own        "quantization" in params.json: `qscale_weight` for a tensor, `qscale_act`

In all of them the weight is `weight * scale`, also where the name ends in `_inv`. The tensors
themselves say which weights are rounded, so lists of exceptions (`ignore`, `ignored_layers`) are
not read. Static scales of activations are left out: our rows have scales of their own.

Sources: compressed-tensors' quant_args.py and quant_config.py; AutoFP8's README; transformers'
FineGrainedFP8Config; vLLM's transformers_utils/configs/mistral.py.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from convert.source.read import FP8, PLAIN, Scale, Tensor
from mixtral_jax.errors import ConfigError

logger = logging.getLogger(__name__)

_REMEDY = "fetch the model's bf16 weights, or FP8 weights (e4m3) with scales of their own alone"
# Fields that say nothing about what the tensors mean, or that the tensors say themselves.
_SILENT = frozenset(
    {
        *("ignore", "ignored_layers", "modules_to_not_convert", "global_compression_ratio"),
        *("quantization_status", "version", "quant_method", "is_checkpoint_fp8_serialized"),
        "dequantize",
    }
)
# Suffixes of a weight's name, by dialect: scales, then what is not needed.
_SCALES = {"hf": ("weight_scale", "weight_scale_inv"), "mistral": ("qscale_weight",), "gguf": ()}
_UNUSED = {
    "hf": ("input_scale", "act_scale", "activation_scale"),
    "mistral": ("qscale_act",),
    "gguf": (),
}
# Zeros, as no schemes but symmetric ones are read.
_ZEROS = ("weight_zero_point", "input_zero_point")


@dataclass(frozen=True)
class Scheme:
    """The form of a source's scales: one for each block of rows and columns, if it has blocks."""

    block: tuple[int, int] | None


def from_quantization_config(fields: Mapping[str, Any]) -> Scheme:
    """Reads the `quantization_config` of a Hugging Face folder.

    Raises ConfigError, with the field and a remedy, for what is not FP8 as described above.
    """
    method = str(fields.get("quant_method")).replace("_", "-")
    if method == "fp8":
        return _from_fp8(fields)
    if method == "compressed-tensors":
        return _from_compressed_tensors(fields)
    raise _unsupported("quant_method", fields.get("quant_method"))


def from_params_quantization(fields: Mapping[str, Any]) -> Scheme:
    """Reads `quantization` of Mistral's own params.json; raises ConfigError likewise."""
    known = {"qformat_weight": ("fp8_e4m3",), "qscheme_act": ("TENSOR", "NO_SCALES", None)}
    _check(fields, known)
    return Scheme(None)


def _from_fp8(fields: Mapping[str, Any]) -> Scheme:
    fixed: dict[str, tuple[Any, ...]] = {
        "activation_scheme": ("static", "dynamic"),
        "kv_cache_scheme": (None,),
        "fmt": ("e4m3", None),
        "scale_fmt": ("float", None),
        "expert_dtype": ("fp8", None),
        "modules_to_convert": (None, []),
    }
    _check(fields, fixed, {"weight_block_size"})
    return Scheme(_block(fields.get("weight_block_size")))


def _from_compressed_tensors(fields: Mapping[str, Any]) -> Scheme:
    fixed: dict[str, tuple[Any, ...]] = {
        "format": ("float-quantized",),
        "kv_cache_scheme": (None,),
        "sparsity_config": (None, {}),
        "transform_config": (None, {}),
    }
    _check(fields, fixed, {"config_groups"})
    groups = fields.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _unsupported("config_groups", groups)
    schemes = {_from_group(name, group) for name, group in groups.items()}
    if len(schemes) > 1:
        raise _unsupported("config_groups", "groups with blocks of several sizes")
    return schemes.pop()


def _from_group(name: str, group: Any) -> Scheme:
    if not isinstance(group, Mapping):
        raise _unsupported(f"config_groups.{name}", group)
    _check(
        group,
        {"output_activations": (None,), "format": ("float-quantized", None)},
        {"weights", "input_activations", "targets"},
        f"config_groups.{name}.",
    )
    weights, activations = group.get("weights"), group.get("input_activations")
    place = f"config_groups.{name}.weights"
    for where, numbers in (
        (place, weights),
        (f"config_groups.{name}.input_activations", activations),
    ):
        if numbers is None and where != place:
            continue  # weights alone are rounded
        if not isinstance(numbers, Mapping):
            raise _unsupported(where, numbers)
        for key, wanted in {"num_bits": 8, "type": "float", "symmetric": True}.items():
            if numbers.get(key) != wanted:
                raise _unsupported(f"{where}.{key}", numbers.get(key))
    assert isinstance(weights, Mapping)
    strategy = weights.get("strategy")
    if strategy not in ("tensor", "channel", "block") or weights.get("dynamic"):
        raise _unsupported(f"{place}.strategy", strategy)
    if weights.get("actorder") not in (None, False):
        raise _unsupported(f"{place}.actorder", weights["actorder"])
    return Scheme(_block(weights.get("block_structure")) if strategy == "block" else None)


def _block(size: Any) -> tuple[int, int] | None:
    """Rows and columns of a block, of a list or of a text such as "128x128"."""
    if size is None:
        return None
    numbers = size.split("x") if isinstance(size, str) else size
    try:
        rows, columns = (int(number) for number in numbers)
    except (TypeError, ValueError):
        raise _unsupported("weight_block_size", size) from None
    if rows < 1 or columns < 1:
        raise _unsupported("weight_block_size", size)
    return rows, columns


def _check(
    fields: Mapping[str, Any],
    fixed: Mapping[str, tuple[Any, ...]],
    read: Collection[str] = (),
    prefix: str = "",
) -> None:
    for name, value in fields.items():
        if name in _SILENT or name in read:
            continue
        if name not in fixed or value not in fixed[name]:
            raise _unsupported(prefix + name, value)


def _unsupported(name: str, value: Any) -> ConfigError:
    return ConfigError(
        f"config field quantization_config.{name}={value!r} is not supported; {_REMEDY}"
    )


class Attached(NamedTuple):
    """Tensors with their scales, which are no tensors of their own any more, and what is wrong."""

    tensors: dict[str, Tensor]
    problems: list[str]


def attach_scales(
    tensors: Mapping[str, Tensor], dialect: str, scheme: Scheme | None, whole: bool = True
) -> Attached:
    """Gives each FP8 weight the scale that belongs to it.

    Args:
        tensors: a source's, by name.
        dialect: hf, mistral or gguf.
        scheme: what the source's config says; None if it says nothing.
        whole: all files could be read; else a missing scale means nothing.
    """
    rounded = [name for name, tensor in tensors.items() if tensor.encoding == FP8]
    if rounded and scheme is None:
        problem = (
            f"tensor {rounded[0]} is stored as {FP8} and the config does not say which scales it "
            f"has; add quantization_config, or {_REMEDY} ({len(rounded)} such tensors)"
        )
        return Attached(dict(tensors), [problem])
    result, problems, num_unused = dict(tensors), [], 0
    for name in rounded:
        assert scheme is not None
        stem = name.removesuffix("weight")
        scales = [stem + ending for ending in _SCALES[dialect] if stem + ending in tensors]
        unused = [stem + ending for ending in _UNUSED[dialect] if stem + ending in tensors]
        zeros = [stem + ending for ending in _ZEROS if stem + ending in tensors]
        for used in (*scales, *unused, *zeros):
            result.pop(used)
        num_unused += len(unused)
        if len(scales) == 1:
            try:
                scale = _scale(tensors[name], tensors[scales[0]], scheme)
                result[name] = replace(tensors[name], scale=scale)
            except ValueError as error:
                problems.append(f"tensor {scales[0]} {error} ({tensors[name].file.name})")
        elif scales or whole:
            ways = " and ".join(scales) or "no scale"
            problems.append(f"tensor {name} is stored as {FP8} with {ways}; {_REMEDY}")
    if num_unused:
        logger.warning(
            "%d static scales of activations are left out: rows are rounded by their own largest "
            "value, or not at all",
            num_unused,
        )
    return Attached(result, problems)


def _scale(weight: Tensor, scale: Tensor, scheme: Scheme) -> Scale:
    """Raises ValueError, for the middle of a sentence, if the two do not belong together."""
    if scale.encoding not in PLAIN or scale.encoding == FP8:
        raise ValueError(f"is stored as {scale.encoding}, which is not supported; {_REMEDY}")
    if len(weight.shape) != 2:
        raise ValueError(f"belongs to a weight of shape {list(weight.shape)}; {_REMEDY}")
    rows, columns = weight.shape
    block = (rows, columns)
    if scale.size > 1:
        block = scheme.block or (1, columns)
    if scheme.block is None and scale.shape == (rows,):
        return Scale(replace(scale, shape=(rows, 1)), block)
    shape = (-(-rows // block[0]), -(-columns // block[1]))
    if scale.size != 1 and scale.shape != shape:
        raise ValueError(
            f"has shape {list(scale.shape)} where a weight of shape {list(weight.shape)} has "
            f"{list(shape)}; {_REMEDY}"
        )
    return Scale(replace(scale, shape=shape), block)
