"""The `quantization_config` of compressed-tensors, as llm-compressor writes it.

    float-quantized   FP8 with scales (scaled.py)
    int-quantized     int8 with scales (scaled.py)
    pack-quantized    4 or 8 bits in words, in groups of inputs or by outputs (packed.py)

Activations may be rounded too, which changes nothing of the weights: ours are rounded row by row.

Sources: compressed-tensors' quant_args.py and quant_config.py.
"""

from collections.abc import Mapping
from typing import Any

from convert.source import packed, scaled
from convert.source.quantization import check_fields, is_among, unsupported
from convert.source.tensor import FP8, INT8
from convert.source.words import COMPRESSED_TENSORS

Scheme = scaled.Scheme | packed.Scheme

# Orders of inputs in which weights were rounded; those of the second kind also group them by size.
_ORDERS = ((None, False, "weight", "static"), (True, "group", "dynamic"))
_FORMATS = ("float-quantized", "int-quantized", "pack-quantized")


def from_compressed_tensors(fields: Mapping[str, Any]) -> Scheme:
    """Reads the fields; raises ConfigError, with the field and a remedy, for other schemes."""
    fixed: dict[str, tuple[Any, ...]] = {
        "format": _FORMATS,
        "kv_cache_scheme": (None,),
        "transform_config": (None, {}),
    }
    check_fields(fields, fixed, {"config_groups", "sparsity_config"})
    sparsity = fields.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise unsupported("sparsity_config", sparsity)
    groups = fields.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise unsupported("config_groups", groups)
    form = fields.get("format", "float-quantized")
    schemes = {_from_group(name, group, form) for name, group in groups.items()}
    if len(schemes) > 1:
        raise unsupported("config_groups", "groups of several bits or sizes")
    return schemes.pop()


def _from_group(name: str, group: Any, form: str) -> Scheme:
    if not isinstance(group, Mapping):
        raise unsupported(f"config_groups.{name}", group)
    check_fields(
        group,
        {"output_activations": (None,), "format": (form, None)},
        {"weights", "input_activations", "targets"},
        f"config_groups.{name}.",
    )
    place = f"config_groups.{name}.weights"
    kind = "float" if form == "float-quantized" else "int"
    bits = (4, 8) if form == "pack-quantized" else (8,)
    weights = _numbers(place, group.get("weights"), kind, bits)
    if (activations := group.get("input_activations")) is not None:
        _numbers(f"config_groups.{name}.input_activations", activations, kind, (8,))
    strategy = weights.get("strategy")
    if form == "pack-quantized":
        return _in_words(place, weights)
    if weights.get("symmetric") is not True:
        raise unsupported(f"{place}.symmetric", weights.get("symmetric"))
    if strategy not in ("tensor", "channel", "block") or weights.get("dynamic"):
        raise unsupported(f"{place}.strategy", strategy)
    if form == "float-quantized" and weights.get("actorder") not in (None, False):
        raise unsupported(f"{place}.actorder", weights["actorder"])
    block = scaled.block_size(weights.get("block_structure")) if strategy == "block" else None
    return scaled.Scheme(block, FP8 if form == "float-quantized" else INT8)


def _numbers(place: str, numbers: Any, kind: str, bits: tuple[int, ...]) -> Mapping[str, Any]:
    """The description of weights or activations; raises ConfigError for others."""
    if not isinstance(numbers, Mapping):
        raise unsupported(place, numbers)
    if not is_among(numbers.get("num_bits"), bits):
        raise unsupported(f"{place}.num_bits", numbers.get("num_bits"))
    if numbers.get("type") != kind:
        raise unsupported(f"{place}.type", numbers.get("type"))
    if kind == "float" and numbers.get("symmetric") is not True:
        raise unsupported(f"{place}.symmetric", numbers.get("symmetric"))
    return numbers


def _in_words(place: str, weights: Mapping[str, Any]) -> packed.Scheme:
    strategy, group = weights.get("strategy"), weights.get("group_size")
    if strategy not in ("group", "channel") or weights.get("dynamic"):
        raise unsupported(f"{place}.strategy", strategy)
    if strategy == "group" and (type(group) is not int or group < 1):
        raise unsupported(f"{place}.group_size", group)
    symmetric = weights.get("symmetric")
    if type(symmetric) is not bool:
        raise unsupported(f"{place}.symmetric", symmetric)
    order = weights.get("actorder")
    if not is_among(order, _ORDERS[0] + _ORDERS[1]):
        raise unsupported(f"{place}.actorder", order)
    return packed.Scheme(
        COMPRESSED_TENSORS,
        weights["num_bits"],
        group if strategy == "group" else None,
        has_zeros=not symmetric,
        needs_order=strategy == "group" and order in _ORDERS[1],
    )
