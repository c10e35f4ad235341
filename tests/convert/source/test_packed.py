"""Integers in words as others publish them: what is read means (code - zero) * scale."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.convert import convert
from convert.errors import ConversionError
from convert.source.open import open_source, scheme_of
from convert.source.read import Reader
from mixtral_jax.errors import ConfigError
from tests.support import packed_sources, sources
from tests.support.packed_sources import CONFIGS, DENSE, LAYOUTS, Folder

UP = "model.layers.1.mlp.up_proj."


@pytest.mark.parametrize("layout", LAYOUTS)
def test_floats_are_those_of_the_formats_formula(tmp_path: Path, layout: str) -> None:
    """Bit for bit, whatever run of rows is read, and however few are decoded at a time."""
    folder = Folder(tmp_path / "published", layout, CONFIGS["moe"])
    source = open_source(folder.path)
    assert not source.problems
    assert source.tensors.keys() == folder.wide.keys()
    for name, want in folder.wide.items():
        tensor = source.tensors[name]
        assert tensor.shape == want.shape
        with Reader(decoded_at_a_time=5 * want.shape[-1]) as reader:
            for first, stop in ((0, len(want)), (3, 21), (len(want) - 1, len(want))):
                rows = want[first:stop]
                have = np.empty(rows.size, np.float32)
                reader.read(tensor, first * (want.size // len(want)), have)
                np.testing.assert_array_equal(have, rows.reshape(-1), err_msg=name)


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_a_piece_is_read_without_its_tensor(tmp_path: Path, layout: str) -> None:
    """128 of 4,096 rows, whose words stand apart in 8 MiB: a quarter of that is in memory."""
    size, count = 4096, 128
    shape = (size // 8, size) if layout == "gptq" else (size, size // 8)
    stem = "model.layers.0.self_attn.q_proj."
    stored = {
        stem + "qweight": np.zeros(shape, np.int32),
        stem + "qzeros": np.zeros((size // 128, size // 8), np.int32),
        stem + "scales": np.ones((size // 128, size), np.float16),
    }
    fields = LAYOUTS[layout][0] | dict(group_size=128)
    path = sources.write_hf(tmp_path, DENSE | dict(quantization_config=fields), stored)
    tensor = open_source(path).tensors[stem + "weight"]
    out = np.empty(count * size, np.float32)
    with Reader(decoded_at_a_time=1 << 15) as reader:
        tracemalloc.start()
        reader.read(tensor, 7 * size, out)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2 << 20


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_becomes_floats(tmp_path: Path, kind: str) -> None:
    folder = Folder(tmp_path / "published", "gptq in the order of sizes", CONFIGS[kind])
    convert(folder.path, tmp_path / "ours", dtype="float32")
    have = sources.parameters(tmp_path / "ours")
    want = packed_sources.ours(folder.wide)
    sources.assert_same({name: have[name].reshape(want[name].shape) for name in have}, want)


def test_words_by_hand() -> None:
    """One word of eight fields in each layout, of an identity that one can read."""
    from convert.source.words import AWQ, COMPRESSED_TENSORS, GPTQ

    word = np.asarray([[0x76543210]], np.int32)
    assert GPTQ.codes(word, 4).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert COMPRESSED_TENSORS.codes(word, 4).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    # Outputs 0 2 4 6 1 3 5 7 stand in fields 0 .. 7.
    assert AWQ.codes(word, 4).tolist() == [[0], [4], [1], [5], [2], [6], [3], [7]]
    assert GPTQ.zeros(word, 8, 4).tolist() == [[0], [1], [2], [3], [4], [5], [6], [7]]
    assert GPTQ.codes(word, 8).tolist() == [[0x10, 0x32, 0x54, 0x76]]


@pytest.mark.parametrize(
    ("fields", "path", "value"),
    [
        (packed_sources.gptq(), "bits", 3),
        (packed_sources.gptq(), "bits", 2),
        (packed_sources.gptq(), "bits", 4.0),
        (packed_sources.gptq(), "group_size", 0),
        (packed_sources.gptq(), "checkpoint_format", "marlin"),
        (packed_sources.gptq(), "is_marlin_format", True),
        (packed_sources.gptq(), "dynamic", {"+:.*down": {"bits": 8}}),
        (packed_sources.gptq(), "unheard_of", 1),
        (packed_sources.awq(), "version", "gemv"),
        (packed_sources.awq(), "version", "gemv_fast"),
        (packed_sources.awq(), "backend", "llm-awq"),
        (packed_sources.awq(), "bits", 8),
        (packed_sources.awq(), "zero_point", False),
        (
            packed_sources.compressed_tensors(num_bits=3),
            "config_groups.group_0.weights.num_bits",
            3,
        ),
        (
            packed_sources.compressed_tensors(type="float"),
            "config_groups.group_0.weights.type",
            "float",
        ),
        (
            packed_sources.compressed_tensors(strategy="block"),
            "config_groups.group_0.weights.strategy",
            "block",
        ),
        (
            packed_sources.compressed_tensors(actorder="alphabetical"),
            "config_groups.group_0.weights.actorder",
            "alphabetical",
        ),
        (
            packed_sources.compressed_tensors("int-quantized", num_bits=8, symmetric=False),
            "config_groups.group_0.weights.symmetric",
            False,
        ),
    ],
)
def test_other_schemes_are_named(fields: dict[str, Any], path: str, value: Any) -> None:
    if "." not in path:
        fields = fields | {path: value}
    with pytest.raises(ConfigError, match=rf"quantization_config\.{path}=.*not supported; fetch"):
        scheme_of(fields)


@pytest.mark.parametrize(
    ("layout", "name", "value", "problem"),
    [
        ("gptq", "qzeros", None, "qweight has no .*up_proj.qzeros beside it; fetch it"),
        ("gptq", "scales", None, "qweight has no .*up_proj.scales beside it; fetch it"),
        ("gptq", "qweight", None, "up_proj.weight is missing"),
        (
            "gptq",
            "scales",
            np.ones((3, 96), np.float16),
            r"scales has shape \[3, 96\] where one .* 4 bits in groups of 64 inputs has \[1, 96\]",
        ),
        ("gptq", "qzeros", np.ones((1, 11), np.int32), r"qzeros has shape \[1, 11\] where"),
        ("gptq", "qzeros", np.ones((1, 12), np.float32), "is stored as F32 instead of I32"),
        ("gptq", "qweight", np.ones(7, np.int32), r"has shape \[7\] instead of a matrix's"),
        (
            "gptq",
            "qweight",
            np.ones((12, 96), np.int32),
            r"scales has shape \[1, 96\] where .* has \[2, 96\]",
        ),
        ("gptq", "g_idx", np.full(64, 4, np.int32), r"names groups other than 0 \.\. 0"),
        ("gptq", "bias", np.ones(96, np.float16), "is not zero, and these models have no bias"),
        ("gptq", "weight", np.ones((96, 64), np.float16), "weight is there beside"),
        ("packed", "weight_shape", np.asarray([96, 60]), r"is \[96, 60\] where .* \[96, 64\]"),
        ("packed", "weight_scale", np.ones((96, 1), np.int8), "as I8 instead of floats"),
        ("packed, not symmetric", "weight_zero_point", None, "has no .*zero_point beside it"),
        ("gptq in the order of sizes", "g_idx", None, "qweight has no .*up_proj.g_idx beside it"),
        ("packed in the order of sizes", "weight_g_idx", None, "has no .*weight_g_idx beside it"),
        ("awq", "g_idx", np.zeros(64, np.int32), None),
    ],
)
def test_tensors_that_do_not_belong_together(
    tmp_path: Path, layout: str, name: str, value: Any, problem: str | None
) -> None:
    folder = Folder(tmp_path / "whole", layout, DENSE)
    path = folder.write(tmp_path / "changed", **{(UP + name).replace(".", "__"): value})
    if problem is None:  # groups of 32 inputs in another order: read, if not kept
        assert open_source(path).tensors[UP + "weight"].kept_dtype is None
        return
    with pytest.raises(ConversionError, match=problem):
        convert(path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_configuration_that_is_no_object() -> None:
    with pytest.raises(ConfigError, match="quantization_config='gptq' must be an object"):
        scheme_of("gptq")


def test_integers_without_a_configuration(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "whole", "awq", DENSE)
    path = sources.write_hf(tmp_path / "bare", DENSE, folder.stored)
    with pytest.raises(ConversionError, match="holds integers and the config does not say which"):
        convert(path, tmp_path / "ours")


def test_a_scale_that_is_not_finite(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "whole", "awq", DENSE)
    scales = folder.stored[UP + "scales"].copy()
    scales[1, 2] = np.nan
    path = folder.write(tmp_path / "changed", **{(UP + "scales").replace(".", "__"): scales})
    with pytest.raises(ConversionError, match="has a scale that is not finite"):
        convert(path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
