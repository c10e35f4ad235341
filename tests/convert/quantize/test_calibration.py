"""The text by which weights are rounded: ours, or a file's."""

from pathlib import Path

import numpy as np
import pytest

from convert.convert import convert
from convert.errors import ConversionError
from convert.quantize.calibration import calibration_text
from mixtral_jax.checkpoint import restore
from mixtral_jax.model.transformer import named_parameters
from tests.convert.quantize.test_int8 import hugging_face

WEIGHT = "layers.0.attention.q.weight"


def weight(folder: Path) -> np.ndarray:
    return np.asarray(named_parameters(restore.load(folder)[0])[WEIGHT].get_value())


@pytest.mark.slow
def test_a_model_is_rounded_by_the_text_of_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = hugging_face(tmp_path / "src")
    text = tmp_path / "text"
    text.write_text(calibration_text(), encoding="utf-8")
    convert(source, tmp_path / "ours", dtype="int8")
    convert(source, tmp_path / "same", dtype="int8", calibration=text)
    np.testing.assert_array_equal(weight(tmp_path / "same"), weight(tmp_path / "ours"))
    assert not caplog.records
    text.write_text("0123456789 " * 20)
    convert(source, tmp_path / "other", dtype="int8", calibration=text)
    assert (weight(tmp_path / "other") != weight(tmp_path / "ours")).any()
    assert "has 2" in caplog.text and "give some thousands" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff\xfe", "is not in UTF-8"),
        (b" \n", "has no text in it"),
        (b"a\0b\0", "has zero bytes"),
    ],
)
def test_a_text_that_is_none(content: bytes | None, words: str, tmp_path: Path) -> None:
    source, text = hugging_face(tmp_path / "src"), tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(
        ConversionError, match=f"/text {words}.*; give a file of text in UTF-8, or leave"
    ):
        convert(source, tmp_path / "dst", dtype="int8", calibration=text)
    assert not (tmp_path / "dst").exists()


def test_a_text_is_refused_where_nothing_is_rounded_by_it(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "src")
    # Its heads are too narrow for int4.
    words = "calibration is for .* int8 or int4 here; give --dtype int8$"
    with pytest.raises(ConversionError, match=words):
        convert(source, tmp_path / "dst", calibration=tmp_path / "text")
