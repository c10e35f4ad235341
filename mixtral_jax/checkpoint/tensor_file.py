"""A safetensors file of an adapter, read by plain reads.

The library safetensors maps a file into memory, where a file that is cut short while it is read, as
`cp` does to one that it replaces, ends the process. So it checks the header here, and no more.
(huggingface.co/docs/safetensors, "Format")
"""

import math
from io import FileIO
from pathlib import Path
from types import TracebackType

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mixtral_jax.errors import AdapterError

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class TensorFile:
    """The tensors of a file by their names, to be used in a `with` block.

    Args:
        path: a safetensors file whose tensors are float32, float16 or bfloat16.

    Raises AdapterError for a file that is missing or damaged, and for tensors of other dtypes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._offsets: dict[str, int] = {}
        if not path.is_file():
            hint = "give the folder that has both files"
            if path.with_name("adapter_model.bin").exists():
                hint = "a .bin file can run code when it is read: save it as safetensors"
            raise AdapterError(f"{path.parent} has no {path.name}; {hint}")
        try:
            with safe_open(path, framework="numpy") as header:
                for name in header.offset_keys():
                    tensor = header.get_slice(name)
                    self.shapes[name] = tuple(tensor.get_shape())
                    self.dtypes[name] = str(tensor.get_dtype())
            self._file = FileIO(path)
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{path} is damaged ({error}); fetch or save it again") from error
        # Tensors follow one another without gaps.
        position = 8 + int.from_bytes(self._file.read(8), "little")
        for name, dtype in self.dtypes.items():
            if dtype not in DTYPES:
                self._file.close()
                raise AdapterError(
                    f"{path}: {name} is stored as {dtype}; save the adapter as float32 or bfloat16"
                )
            self._offsets[name] = position
            position += math.prod(self.shapes[name]) * np.dtype(DTYPES[dtype]).itemsize

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor as float32. Raises AdapterError if the file has become shorter."""
        array = np.empty(self.shapes[name], DTYPES[self.dtypes[name]])
        rest = array.reshape(-1).view(np.uint8).data
        self._file.seek(self._offsets[name])
        while rest:
            count = self._file.readinto(rest)
            if not count:
                raise AdapterError(f"{self.path} was changed while it was read; try again")
            rest = rest[count:]
        return array.astype(np.float32, copy=False)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
