"""FP8 and int8 weights as others publish them, and the scales of each tensor.

    compressed-tensors   llm-compressor's folders (RedHatAI, neuralmagic), formats float-quantized
                         and int-quantized: `weight` with `weight_scale`, for a tensor [1], for
                         outputs [O 1] or for blocks [O/128 I/128]; `input_scale` where
                         activations have static scales
    fp8                  AutoFP8: the same names; DeepSeek's and transformers' folders:
                         `weight_scale_inv` for blocks or a tensor, `activation_scale`
    Mistral's own        "quantization" in params.json: `qscale_weight` for a tensor, `qscale_act`

In all of them the weight is `weight * scale`, also where the name ends in `_inv`. The tensors
themselves say which weights are rounded, so lists of exceptions (`ignore`, `ignored_layers`) are
not read. Static scales of activations are left out: our rows have scales of their own.

Sources: AutoFP8's README; transformers' FineGrainedFP8Config; vLLM's
transformers_utils/configs/mistral.py; for compressed-tensors see compressed_tensors.py.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from convert.source.quantization import REMEDY, check_fields, unsupported
from convert.source.tensor import FP8, PLAIN, Scale, Tensor

logger = logging.getLogger(__name__)

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
    """The form of a source's scales: one for each block of rows and columns, if it has blocks.

    `encoding` is that of the weights.
    """

    block: tuple[int, int] | None
    encoding: str = FP8


def from_params_quantization(fields: Mapping[str, Any]) -> Scheme:
    """Reads `quantization` of Mistral's own params.json; raises ConfigError as `from_fp8` does."""
    known = {"qformat_weight": ("fp8_e4m3",), "qscheme_act": ("TENSOR", "NO_SCALES", None)}
    check_fields(fields, known)
    return Scheme(None)


def from_fp8(fields: Mapping[str, Any]) -> Scheme:
    """Reads a `quantization_config` of the method fp8.

    Raises ConfigError, with the field and a remedy, for what is not as described above.
    """
    fixed: dict[str, tuple[Any, ...]] = {
        "activation_scheme": ("static", "dynamic"),
        "kv_cache_scheme": (None,),
        "fmt": ("e4m3", None),
        "scale_fmt": ("float", None),
        "expert_dtype": ("fp8", None),
        "modules_to_convert": (None, []),
    }
    check_fields(fields, fixed, {"weight_block_size"})
    return Scheme(block_size(fields.get("weight_block_size")))


def block_size(size: Any) -> tuple[int, int] | None:
    """Rows and columns of a block, of a list or of a text such as "128x128"."""
    if size is None:
        return None
    numbers = size.split("x") if isinstance(size, str) else size
    try:
        rows, columns = (int(number) for number in numbers)
    except (TypeError, ValueError):
        raise unsupported("weight_block_size", size) from None
    if rows < 1 or columns < 1:
        raise unsupported("weight_block_size", size)
    return rows, columns


class Attached(NamedTuple):
    """Tensors with their scales, which are no tensors of their own any more, and what is wrong."""

    tensors: dict[str, Tensor]
    problems: list[str]


def attach_scales(
    tensors: Mapping[str, Tensor], dialect: str, scheme: Scheme | None, whole: bool = True
) -> Attached:
    """Gives each weight of FP8 or int8 the scale that belongs to it.

    Args:
        tensors: a source's, by name.
        dialect: hf, mistral or gguf.
        scheme: what the source's config says; None if it says nothing.
        whole: all files could be read; else a missing scale means nothing.
    """
    encoding = FP8 if scheme is None else scheme.encoding
    rounded = [name for name, tensor in tensors.items() if tensor.encoding == encoding]
    if rounded and scheme is None:
        problem = (
            f"tensor {rounded[0]} is stored as {encoding} and the config does not say which scales "
            f"it has; add quantization_config, or {REMEDY} ({len(rounded)} such tensors)"
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
            problems.append(f"tensor {name} is stored as {encoding} with {ways}; {REMEDY}")
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
        raise ValueError(f"is stored as {scale.encoding}, which is not supported; {REMEDY}")
    if len(weight.shape) != 2:
        raise ValueError(f"belongs to a weight of shape {list(weight.shape)}; {REMEDY}")
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
            f"{list(shape)}; {REMEDY}"
        )
    return Scale(replace(scale, shape=shape), block)
