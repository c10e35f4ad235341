"""The header of a safetensors file: eight bytes of length, JSON, then the data.

Faults of a file are found here, where they can be named, and without the data being read.
(huggingface.co/docs/safetensors, "Format")
"""

import json
from io import FileIO
from pathlib import Path
from typing import Any

from convert.errors import ConversionError
from convert.source.tensor import STORED, Tensor

# A header is a few hundred kilobytes; a longer one is no safetensors file.
_LONGEST_HEADER = 100 << 20


def safetensors_header(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file by name.

    Encodings that cannot be read are let through, for the tensor may not be needed. Raises
    ConversionError for a file that is not whole, or whose tensors overlap or leave gaps.
    """
    length = path.stat().st_size
    with FileIO(path) as file:
        count = int.from_bytes(file.read(8), "little")
        if length < 8 or count > min(length - 8, _LONGEST_HEADER):
            raise ConversionError([f"{path} is not a safetensors file, or was cut short"])
        text = file.read(count)
    try:
        entries = json.loads(text, object_pairs_hook=without_duplicates)
        del text
        entries.pop("__metadata__", None)
        tensors = {name: _entry(path, 8 + count, entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConversionError([f"{path}: its header is malformed: {error}"]) from error
    end = _check_layout(path, 8 + count, tensors)
    if end != length:
        remedy = "it was cut short; fetch it again" if end > length else "its end is not accounted"
        raise ConversionError(
            [f"{path} has {length} bytes where its header promises {end}: {remedy}"]
        )
    return {name: tensor for name, (tensor, _) in tensors.items()}


def _entry(path: Path, data: int, entry: Any) -> tuple[Tensor, int]:
    """Returns a tensor and the offset of its end; raises what JSON content can make it raise."""
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    numbers = (begin, end, *shape)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{entry} has a number that is no offset or size")
    return Tensor(path, data + begin, shape, str(entry["dtype"])), data + end


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object by its pairs; raises ValueError naming the keys that are there twice.

    It is an `object_pairs_hook` of `json.loads`, which would keep the last of two values.
    """
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{', '.join(twice)} is there twice")
    return content


def _check_layout(path: Path, data: int, tensors: dict[str, tuple[Tensor, int]]) -> int:
    """Checks that tensors follow one another without a gap. Returns the end of the last."""
    position = data
    for name, (tensor, end) in sorted(tensors.items(), key=lambda item: item[1][0].offset):
        if tensor.offset != position or end < position:
            raise ConversionError(
                [f"{path}: tensor {name} overlaps another one, or there is a gap before it"]
            )
        if tensor.encoding in STORED and end - position != tensor.nbytes:
            raise ConversionError(
                [
                    f"{path}: tensor {name} of shape {list(tensor.shape)} in {tensor.encoding} "
                    f"has {end - position} bytes instead of {tensor.nbytes}"
                ]
            )
        position = end
    return position
