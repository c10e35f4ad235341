"""Reading equals what the formats' own libraries wrote; a damaged file is named, never misread."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from convert.errors import ConversionError
from convert.source.gguf import gguf_header
from convert.source.read import Reader, Tensor, is_readable, is_same
from convert.source.safetensors import safetensors_header
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


def test_gguf_header_equals_the_package(tmp_path: Path) -> None:
    path = sources.write_gguf(
        tmp_path / "a.gguf", sources.tensors(sources.MOE), Q.Q8_0, general__name="a näme"
    )
    tensors, metadata = gguf_header(path)
    theirs = gguf.GGUFReader(path)
    fields = {name: f.contents() for name, f in theirs.fields.items() if name[:5] != "GGUF."}
    assert metadata == fields
    assert metadata["general.name"] == "a näme"
    assert {
        t.name: (t.data_offset, tuple(reversed(t.shape)), t.tensor_type.name)
        for t in theirs.tensors
    } == {name: (t.offset, t.shape, t.encoding) for name, t in tensors.items()}


def test_gguf_arrays(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_array("words", ["a", "", "ö"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_bool("yes", True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = gguf_header(tmp_path / "a.gguf")[1]
    assert metadata["words"] == ["a", "", "ö"]
    assert metadata["numbers"] == [1, -2, 3]
    assert metadata["yes"] is True


def test_a_gguf_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = sources.write_gguf(tmp_path / "a.gguf", sources.tensors(sources.DENSE)).read_bytes()
    for length in [0, 3, 10, 30, *range(40, len(whole), len(whole) // 40), len(whole) - 1]:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ConversionError, match="cut.gguf"):
            gguf_header(tmp_path / "cut.gguf")


def header(content: Any, data: int) -> bytes:
    """A safetensors file with this header and so many bytes of data."""
    text = json.dumps(content).encode() if not isinstance(content, bytes) else content
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(begin: int, end: int, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "cut short"),
        (b"\xff" * 20, "cut short"),
        ((1 << 30).to_bytes(8, "little") + bytes(40), "cut short"),
        (header({"a": entry(0, 8)}, 8)[:-1], "promises .* cut short; fetch it again"),
        (header({"a": entry(0, 8)}, 9), "promises"),
        (header({"a": entry(0, 8), "b": entry(4, 12)}, 12), "tensor b overlaps"),
        (header({"a": entry(0, 8), "b": entry(12, 20)}, 20), "tensor b .* gap"),
        (header({"a": entry(8, 0)}, 8), "overlaps|gap"),
        (header({"a": entry(0, 8, shape=[3])}, 8), "tensor a .* 8 bytes instead of 12"),
        (header({"a": entry(0, 8, dtype="BF16")}, 8), "tensor a .* 8 bytes instead of 4"),
        (header({"a": entry(0, 8, shape=[-2])}, 8), "malformed"),
        (header({"a": entry(0, 8, shape=2)}, 8), "malformed"),
        (header({"a": {"dtype": "F32"}}, 8), "malformed"),
        (header({"a": entry(0, True)}, 1), "malformed"),
        (header(b'{"a": {}, "a": {}}', 0), "a is there twice"),
        (header([1], 0), "malformed"),
        (header(b"no json", 0), "malformed"),
    ],
)
def test_damaged_safetensors_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=says) as error:
        safetensors_header(path)
    assert "bad.safetensors" in str(error.value)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.integers(0, 250))
def test_no_bytes_raise_anything_else(tmp_path: Path, text: bytes, length: int) -> None:
    path = tmp_path / "noise.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text)
    with pytest.raises(ConversionError):
        safetensors_header(path)
    path.write_bytes(b"GGUF\x03\0\0\0" + text)
    with pytest.raises(ConversionError):
        gguf_header(path)


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
    assert all(map(is_readable, ("F32", "F16", "BF16", "Q4_1", "Q8_0", "Q4_K", "Q6_K")))
    assert not any(map(is_readable, ("F8_E4M3", "I8", "I32", "nonsense")))
