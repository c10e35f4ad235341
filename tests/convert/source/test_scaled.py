"""FP8 as others publish it: what is read means weight times scale, what is not is named."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.convert import convert
from convert.errors import ConversionError
from convert.source.open import scheme_of
from convert.source.scaled import from_params_quantization
from mixtral_jax.errors import ConfigError
from tests.support import fp8_sources, sources

CONFIGS = {"dense": sources.DENSE, "moe": sources.MOE}


@pytest.mark.parametrize(
    ("kind", "layout"), [*(("moe", layout) for layout in fp8_sources.LAYOUTS), ("dense", "channel")]
)
def test_every_layout_means_weight_times_scale(tmp_path: Path, layout: str, kind: str) -> None:
    path, wide, _ = fp8_sources.write(tmp_path / "fp8", layout, CONFIGS[kind])
    convert(path, tmp_path / "ours", dtype="float32")
    sources.assert_same(sources.parameters(tmp_path / "ours"), sources.ours(wide))


@pytest.mark.parametrize("form", ["tensor", "channel"])
def test_mistrals_own_layout(tmp_path: Path, form: str) -> None:
    """Per tensor as published; per output too, because rows of heads change their order."""
    hf = sources.tensors(sources.MOE, sources.BF16)
    names = sources.consolidated(hf)
    stored, wide = fp8_sources.rounded(names, "qscale_weight", form, "qscale_act")
    folder = tmp_path / "published"
    quantization = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    sources.write_params(folder, sources.MOE_PARAMS | {"quantization": quantization}, stored)
    sources.write_params(tmp_path / "wide", sources.MOE_PARAMS, wide)
    for dtype in ("float32", "fp8"):
        convert(folder, tmp_path / dtype, dtype=dtype)
    convert(tmp_path / "wide", tmp_path / "want", dtype="float32")
    want = sources.parameters(tmp_path / "want")
    sources.assert_same(sources.parameters(tmp_path / "float32"), want)
    kept = fp8_sources.widened(sources.parameters(tmp_path / "fp8"))
    sources.assert_same(kept, want)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The configuration of RedHatAI's folders with one field changed, by its dotted name."""
    fields: dict[str, Any] = fp8_sources.compressed_tensors("channel")
    *parents, last = path.split(".")
    inner = fields
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return fields


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("quant_method", "bitsandbytes"),
        ("quant_method", "eetq"),
        ("format", "marlin-24"),
        ("format", "nvfp4-pack-quantized"),
        ("kv_cache_scheme", {"num_bits": 8, "type": "float"}),
        ("sparsity_config", {"format": "sparse-24-bitmask"}),
        ("config_groups", {}),
        ("config_groups.group_0.weights.num_bits", 4),
        ("config_groups.group_0.weights.type", "int"),
        ("config_groups.group_0.weights.symmetric", False),
        ("config_groups.group_0.weights.strategy", "group"),
        ("config_groups.group_0.input_activations.num_bits", 16),
        ("config_groups.group_0.output_activations", {"num_bits": 8}),
        ("unheard_of", 1),
    ],
)
def test_other_schemes_are_named(path: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"quantization_config\.{path}.*not supported; fetch"):
        scheme_of(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("kv_cache_scheme", "static"),  # AMD Quark's Mixtral
        ("fmt", "e5m2"),
        ("scale_fmt", "ue8m0"),
        ("weight_block_size", [128]),
    ],
)
def test_other_schemes_of_fp8_are_named(path: str, value: Any) -> None:
    fields = {"quant_method": "fp8", "activation_scheme": "dynamic", path: value}
    with pytest.raises(ConfigError, match=rf"quantization_config\.{path}.*not supported"):
        scheme_of(fields)


def test_other_formats_of_mistral_are_named() -> None:
    with pytest.raises(ConfigError, match="qformat_weight='int8'.*not supported"):
        from_params_quantization({"qformat_weight": "int8"})


def refused(tmp_path: Path, config: dict[str, Any], stored: sources.Tensors) -> list[str]:
    path = sources.write_hf(tmp_path / "fp8", config, stored)
    with pytest.raises(ConversionError) as caught:
        convert(path, tmp_path / "ours")
    return caught.value.problems


def test_fp8_without_a_configuration(tmp_path: Path) -> None:
    _, _, stored = fp8_sources.write(tmp_path / "whole", "channel", sources.DENSE)
    problems = refused(tmp_path, sources.DENSE, stored)
    assert "the config does not say which scales it has; add quantization_config" in problems[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("none", "model.layers.1.mlp.up_proj.weight is stored as F8_E4M3 with no scale"),
        ("two", "with model.layers.1.mlp.up_proj.weight_scale and .*weight_scale_inv"),
        ("shape", r"weight_scale has shape \[7, 1\] where a weight of shape \[96, 32\]"),
        ("keys", "k_scale is not known"),
    ],
)
def test_scales_that_do_not_fit(tmp_path: Path, change: str, problem: str) -> None:
    _, _, stored = fp8_sources.write(tmp_path / "whole", "channel", sources.DENSE)
    stem = "model.layers.1.mlp.up_proj."
    scale = stored.pop(stem + "weight_scale")
    changes: dict[str, sources.Tensors] = {
        "none": {},
        "two": {stem + "weight_scale": scale, stem + "weight_scale_inv": scale},
        "shape": {stem + "weight_scale": scale[:7]},
        "keys": {stem + "weight_scale": scale, "model.layers.1.self_attn.k_scale": scale[0]},
    }
    config = sources.DENSE | {"quantization_config": fp8_sources.compressed_tensors("channel")}
    (found,) = refused(tmp_path, config, stored | changes[change])
    assert re.search(problem, found), found


def test_a_scale_that_is_not_finite(tmp_path: Path) -> None:
    _, _, stored = fp8_sources.write(tmp_path / "whole", "channel", sources.DENSE)
    stored["model.layers.1.mlp.up_proj.weight_scale"][3] = np.inf
    config = sources.DENSE | {"quantization_config": fp8_sources.compressed_tensors("channel")}
    (problem,) = refused(tmp_path, config, stored)
    assert "has a scale that is not finite" in problem
    assert not (tmp_path / "ours").exists()
