"""Reading equals what the formats' own libraries wrote."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from safetensors.numpy import save_file

from convert.errors import ConversionError
from convert.source.gguf import gguf_header
from convert.source.read import Reader, is_same
from convert.source.safetensors import safetensors_header
from convert.source.tensor import Tensor, is_readable
from tests.support import sources

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": sources.BF16}


@pytest.fixture
def random() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((4, 5, 6), np.float32)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", ["F32", "BF16"])
def test_any_run_of_elements(tmp_path: Path, random: np.ndarray, stored: str, wanted: str) -> None:
    value = random.astype(DTYPES[stored])
    save_file({"before": random, "it": value, "after": random}, tmp_path / "a.safetensors")
    tensor = safetensors_header(tmp_path / "a.safetensors")["it"]
    assert (tensor.shape, tensor.encoding, tensor.nbytes) == ((4, 5, 6), stored, value.nbytes)
    with Reader(decoded_at_a_time=7) as reader:  # several steps, the last one short
        for start, size in ((0, 120), (0, 1), (119, 1), (37, 50), (60, 0)):
            out = np.empty(size, DTYPES[wanted])
            reader.read(tensor, start, out)
            want = value.reshape(-1)[start : start + size].astype(DTYPES[wanted])
            np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_1])
def test_gguf_tensors_equal_the_package(tmp_path: Path, kind: Q) -> None:
    value = np.random.default_rng(0).standard_normal((3, 8, 64), np.float32)
    stored = gguf.quants.quantize(value, kind)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("first", value[0, 0])
    writer.add_tensor("it", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = gguf_header(tmp_path / "a.gguf")[0]["it"]
    assert (tensor.shape, tensor.encoding, tensor.nbytes) == ((3, 8, 64), kind.name, stored.nbytes)
    rows = slice(5 * 64, 17 * 64)
    out = np.empty(12 * 64, np.float32)
    with Reader() as reader:
        reader.read(tensor, rows.start, out)
        rounded = np.empty(12 * 64, sources.BF16)
        reader.read(tensor, rows.start, rounded)
    want = gguf.quants.dequantize(stored, kind).reshape(-1)[rows]
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(rounded, want.astype(sources.BF16))


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones(1000, np.float32)}, path)
    tensor = safetensors_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-100])
    with Reader() as reader, pytest.raises(ConversionError, match="became shorter"):
        reader.read(tensor, 0, np.empty(1000, np.float32))


def test_same_bytes(tmp_path: Path, random: np.ndarray) -> None:
    other = random.copy()
    other[-1, -1, -1] += 1
    found: dict[str, Tensor] = {}
    for name, value in dict(one=random, copy=random, other=other, bent=random.reshape(-1)).items():
        save_file({name: value}, tmp_path / f"{name}.safetensors")
        found |= safetensors_header(tmp_path / f"{name}.safetensors")
    assert is_same(found["one"], found["copy"])
    assert not is_same(found["one"], found["other"])
    assert not is_same(found["one"], found["bent"])


def test_readable_encodings() -> None:
    floats = ("F32", "F16", "BF16", "F8_E4M3")
    assert all(map(is_readable, (*floats, "Q4_1", "Q8_0", "Q4_K", "Q6_K")))
    assert not any(map(is_readable, ("F8_E5M2", "I8", "I32", "nonsense")))
