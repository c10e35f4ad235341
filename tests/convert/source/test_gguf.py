"""The header of a GGUF file equals what the gguf package reads; a damaged file is named."""

import math
import struct
from pathlib import Path

import gguf
import pytest
from gguf import GGMLQuantizationType as Q
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.errors import ConversionError
from convert.source.gguf import gguf_header
from convert.source.tensor import is_readable
from tests.support import sources


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


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def small_gguf(metadata: bytes = b"", num_values: int = 0, kind: int = 0) -> bytes:
    """A file with one tensor of 2 x 32 elements, "blk.0.attn_q.weight", of a type by number."""
    entry = _string("blk.0.attn_q.weight") + struct.pack("<IQQIQ", 2, 32, 2, kind, 0)
    return b"GGUF" + struct.pack("<IQQ", 3, 1, num_values) + metadata + entry + bytes(4096)


@pytest.mark.parametrize(
    "kind, value, is_good",
    [
        (4, struct.pack("<I", 0), False),
        (4, struct.pack("<I", 24), False),
        (4, struct.pack("<I", 33), False),
        (5, struct.pack("<i", -32), False),
        (6, struct.pack("<f", 32.0), False),
        (7, b"\1", False),
        (8, _string("32"), False),
        (9, struct.pack("<IQI", 4, 1, 32), False),
        (4, struct.pack("<I", 64), True),
        (4, struct.pack("<I", 1), True),
    ],
)
def test_alignment_is_a_power_of_two(
    tmp_path: Path, kind: int, value: bytes, is_good: bool
) -> None:
    metadata = _string("general.alignment") + struct.pack("<I", kind) + value
    path = tmp_path / "a.gguf"
    path.write_bytes(small_gguf(metadata, 1))
    if is_good:
        (tensor,) = gguf_header(path)[0].values()
        header = len(small_gguf(metadata, 1)) - 4096
        alignment = struct.unpack("<I", value)[0]
        assert tensor.offset == math.ceil(header / alignment) * alignment
        return
    with pytest.raises(ConversionError, match=r"a\.gguf.*general\.alignment is .* power of two"):
        gguf_header(path)


@pytest.mark.parametrize("kind", [4, 31, 999, 2**32 - 1])
def test_a_type_that_is_not_known_is_left_to_the_check(tmp_path: Path, kind: int) -> None:
    """Of removed types, such as Q4_0_4_4 (31), and newer ones neither name nor size is known."""
    path = tmp_path / "a.gguf"
    path.write_bytes(small_gguf(kind=kind))
    tensor = gguf_header(path)[0]["blk.0.attn_q.weight"]
    assert (tensor.shape, tensor.encoding) == ((2, 32), f"GGML type {kind}")
    assert not is_readable(tensor.encoding)


WHOLE = small_gguf(
    _string("general.alignment")
    + struct.pack("<II", 4, 32)
    + _string("words")
    + struct.pack("<IIQ", 9, 8, 2)
    + _string("a")
    + _string("b"),
    2,
)


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 4097), st.integers(0, 255)), min_size=1, max_size=4
    )
)
def test_a_changed_header_raises_nothing_else(
    tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    """Some bytes of a good header are replaced: it is read, or refused with its name."""
    content = bytearray(WHOLE)
    for position, byte in changes:
        content[position] = byte
    path = tmp_path / "changed.gguf"
    path.write_bytes(content)
    try:
        gguf_header(path)
    except ConversionError as error:
        assert "changed.gguf" in str(error)
