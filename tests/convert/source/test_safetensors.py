"""A safetensors header is read as it was written; a damaged file is named, never misread."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.errors import ConversionError
from convert.source.gguf import gguf_header
from convert.source.safetensors import safetensors_header


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
        (header(b"[" * 200_000, 0), "malformed"),
        (header(b'{"a":' * 200_000, 0), "malformed"),
        (header(b'{"a": {"dtype": "F32", "shape": ' + b"[" * 200_000, 8), "malformed"),
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


VALID = header({"__metadata__": {"format": "pt"}, "a": entry(0, 8), "b": entry(8, 20, [3])}, 20)


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(VALID) - 21),
            st.integers(0, 2),
            st.sampled_from([b"[", b"{", b"}", b"]", b'"', b",", b"9", b"-", b"e", b"\xff", b"\\"]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_changed_header_raises_nothing_else(
    tmp_path: Path, changes: list[tuple[int, int, bytes]]
) -> None:
    """Bytes of a good header are inserted, replaced or doubled: it is read, or refused by name."""
    content = VALID
    for position, removed, byte in changes:
        content = content[:position] + byte + content[position + removed :]
    text = content[8:-20]
    path = tmp_path / "changed.safetensors"
    for file in (content, len(text).to_bytes(8, "little") + text + bytes(20)):
        path.write_bytes(file)
        try:
            safetensors_header(path)
        except ConversionError as error:
            assert "changed.safetensors" in str(error)
