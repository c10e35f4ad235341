"""Tiny FP8 folders in the layouts that are published, and what their weights mean.

The layouts are written out here by hand: names, shapes and `quantization_config` are those of
RedHatAI's and neuralmagic's folders (compressed-tensors), AutoFP8's, DeepSeek's and Mistral's own.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tests.support import sources
from tests.support.sources import Tensors

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK = 16  # published: 128

_NUMBERS = dict(num_bits=8, type="float", symmetric=True, group_size=None, actorder=None)
# What stays as it is: embedding, head and routers, under Hugging Face's names and Mistral's.
_FLOATS = (
    *("embed_tokens.weight", "lm_head.weight", ".block_sparse_moe.gate.weight"),
    *("tok_embeddings.weight", "output.weight", ".feed_forward.gate.weight"),
)


def compressed_tensors(strategy: str, *, static: bool = False) -> dict[str, Any]:
    """`quantization_config` as llm-compressor writes it."""
    weights = _NUMBERS | dict(strategy=strategy, dynamic=False, observer="minmax")
    if strategy == "block":
        weights |= dict(block_structure=[BLOCK, BLOCK])
    inputs = _NUMBERS | dict(strategy="tensor" if static else "token", dynamic=not static)
    group = dict(
        targets=["Linear"], weights=weights, input_activations=inputs, output_activations=None
    )
    return dict(
        quant_method="compressed-tensors",
        format="float-quantized",
        config_groups=dict(group_0=group),
        ignore=["lm_head", "re:.*block_sparse_moe.gate"],
        kv_cache_scheme=None,
        quantization_status="compressed",
        global_compression_ratio=1.5,
    )


# By layout: quantization_config, the name of the scales, their shape, that of activations' scales.
LAYOUTS: dict[str, tuple[dict[str, Any], str, str, str | None]] = {
    "channel": (compressed_tensors("channel"), "weight_scale", "channel", None),
    "tensor": (compressed_tensors("tensor", static=True), "weight_scale", "tensor", "input_scale"),
    "block": (compressed_tensors("block"), "weight_scale", "block", None),
    "autofp8": (
        dict(quant_method="fp8", activation_scheme="static", ignored_layers=["lm_head"]),
        "weight_scale",
        "scalar",
        "input_scale",
    ),
    "deepseek": (
        dict(
            quant_method="fp8",
            fmt="e4m3",
            activation_scheme="dynamic",
            weight_block_size=[BLOCK, BLOCK],
        ),
        "weight_scale_inv",
        "block",
        None,
    ),
}


def write(
    folder: Any, layout: str, config: Mapping[str, Any], dtype: Any = sources.BF16
) -> tuple[Any, Tensors, Tensors]:
    """Writes a Hugging Face folder; returns its path, its weights widened to f32, its tensors."""
    quantization, ending, form, of_activations = LAYOUTS[layout]
    stored, wide = rounded(sources.tensors(config, dtype), ending, form, of_activations)
    path = sources.write_hf(folder, dict(config) | dict(quantization_config=quantization), stored)
    return path, wide, stored


def rounded(
    hf: Tensors, ending: str, form: str, of_activations: str | None
) -> tuple[Tensors, Tensors]:
    """Tensors as published, and the weights that they stand for, in float32."""
    stored: Tensors = {}
    wide = {name: value.astype(np.float32) for name, value in hf.items()}
    for name, value in hf.items():
        if value.ndim == 1 or name.endswith(_FLOATS):
            stored[name] = value
            continue
        values, scale, meant = _round(value.astype(np.float32), form)
        stem = name.removesuffix("weight")
        stored |= {name: values, stem + ending: scale}
        wide[name] = meant
        if of_activations:
            shape = () if form == "scalar" else (1,)
            stored[stem + of_activations] = np.full(shape, 0.01, np.float32)
    return stored, wide


def widened(ours: Tensors) -> Tensors:
    """Parameters of an fp8 checkpoint of ours as float32, without scales."""
    found: Tensors = {}
    for name, value in ours.items():
        if name.endswith(".scale"):
            continue
        found[name] = value.astype(np.float32)
        scale = ours.get(name.removesuffix("weight") + "scale")
        if scale is not None:
            found[name] *= scale.reshape(scale.shape + (1,) * (value.ndim - scale.ndim))
    return found


def _round(weight: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """FP8 values, their scales as published, and the product of both."""
    rows, columns = weight.shape
    if form == "block":
        height, width = BLOCK, BLOCK
    else:
        height, width = (1, columns) if form == "channel" else (rows, columns)
    scale = np.zeros((-(-rows // height), -(-columns // width)), np.float32)
    factors = np.zeros_like(weight)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
            scale[i, j] = np.abs(weight[place]).max() / 448
            factors[place] = scale[i, j]
    values = (weight / factors).astype(FP8)
    meant = values.astype(np.float32) * factors
    shapes: dict[str, tuple[int, ...]] = {"scalar": (), "tensor": (1,)}
    return values, scale.reshape(shapes.get(form, scale.shape)), meant
