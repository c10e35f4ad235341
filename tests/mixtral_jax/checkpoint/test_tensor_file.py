"""Tensors are read as the library safetensors wrote them; a file that changes ends in an error."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mixtral_jax.checkpoint.tensor_file import TensorFile
from mixtral_jax.errors import AdapterError

TENSORS = {
    "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bf16": np.arange(5).astype(ml_dtypes.bfloat16),
    "f16": np.arange(3).astype(np.float16),
    "scalar": np.array(7, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def test_tensors_are_read_by_name(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt", "long": "x" * 1001})
    with TensorFile(path) as file:
        assert file.shapes == {name: array.shape for name, array in TENSORS.items()}
        assert file.dtypes["bf16"] == "BF16"
        for name, array in TENSORS.items():
            read = file.read(name)
            assert read.dtype == np.float32
            np.testing.assert_array_equal(read, array.astype(np.float32))


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file({"long": np.zeros(1 << 20, np.float32)}, path)
    with TensorFile(path) as file:
        path.write_bytes(b"")  # as `cp` does first to a file that it replaces
        with pytest.raises(AdapterError, match="was changed while it was read; try again"):
            file.read("long")


def test_other_dtypes_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file(TENSORS | {"ids": np.arange(3)}, path)
    with pytest.raises(AdapterError, match="ids is stored as I64; save the adapter as float32"):
        TensorFile(path)
