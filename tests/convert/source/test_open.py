"""A folder's form is recognised, and files that are not the model's are passed over."""

from pathlib import Path

import numpy as np

from convert.convert import convert
from tests.support import sources


def test_hugging_face_goes_before_consolidated(tmp_path: Path) -> None:
    path, hf = sources.write(tmp_path / "src", "folder", sources.DENSE, np.float32)
    zeros = {name: np.zeros_like(value) for name, value in hf.items()}
    sources.write_consolidated(path, sources.PARAMS, zeros)
    convert(path, tmp_path / "dst")
    sources.assert_same(sources.parameters(tmp_path / "dst"), sources.ours(hf))
