"""export: from a checkpoint folder of ours to one that transformers, vLLM and others load.

The way of `convert` backwards, by the same table: pieces are read in one thread and written to
their places in the shards in another. Bytes are copied, so what was converted without a change of
dtype comes back bit for bit, under Hugging Face's names, experts one by one.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from convert.check import check_space
from convert.errors import ConversionError
from convert.merge import MergedReader
from convert.name_table import NameTable, name_table
from convert.pieces import ParameterPiece, filled, overlaps, pieces
from convert.progress import Progress
from mixtral_jax.checkpoint.folder import CONFIG_FILE, Card, finished_at
from mixtral_jax.checkpoint.parameters import CHUNK_BYTES, parameter_shapes, stored_bytes
from mixtral_jax.checkpoint.writer import ParameterReader
from mixtral_jax.hf_config import to_hf
from mixtral_jax.tokenization import tokenizer

INDEX_FILE = "model.safetensors.index.json"
_ENCODINGS = {"float32": "F32", "bfloat16": "BF16"}


def export(
    checkpoint: Path,
    destination: Path,
    *,
    shard_bytes: int = 5_000_000_000,
    reader: MergedReader | None = None,
    progress: Progress = lambda done, total: None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Card:
    """Writes a checkpoint folder as a Hugging Face folder: safetensors, config and tokenizer.

    Args:
        checkpoint: what `convert` made.
        destination: a folder that does not exist or is empty.
        shard_bytes: a file is closed before it would hold more; a larger tensor is alone in one.
        reader: of the same checkpoint with an adapter, which is merged into what is written; by
            default the stored values are written.
        progress: called with bytes written and bytes in all.
        chunk_bytes: that of the checkpoint; pieces of another size cost more to read.

    Raises ConfigError if `checkpoint` is none, ConversionError if it is int8 or fp8 or there is no
    room for it, and FileExistsError if `destination` is not empty. Nothing is left there then.
    """
    card = Card.read(checkpoint)
    if card.dtype not in _ENCODINGS:
        raise ConversionError(
            [
                f"{checkpoint} is stored as {card.dtype} and only floats are exported; "
                "convert the weights with --dtype bfloat16 and export that"
            ]
        )
    table = name_table(card.model, "hf")
    stored = parameter_shapes(card.model, card.dtype)
    check_space(stored, destination)
    shapes = {row.source: row.shape for row in table.rows}
    shards = cut(shapes, np.dtype(card.dtype).itemsize, shard_bytes)
    with finished_at(destination) as partial:
        source = reader or ParameterReader(checkpoint)
        _write_shards(source, card, table, shards, partial, progress, chunk_bytes)
        index = {
            "metadata": {"total_size": stored_bytes(stored)},
            "weight_map": {name: shard.file for shard in shards for name in shard.offsets},
        }
        _write_json(partial / INDEX_FILE, index)
        tokenizer.copy(checkpoint, partial)
        _write_json(partial / CONFIG_FILE, to_hf(card.model, card.dtype))
    return card


@dataclass(frozen=True)
class Shard:
    """One safetensors file to be: its tensors one after the other, and no gap."""

    file: str
    shapes: Mapping[str, tuple[int, ...]]
    offsets: Mapping[str, int]  # of each tensor's first byte, counted from the first one's
    nbytes: int

    def header(self, dtype: str) -> bytes:
        """The bytes before the first tensor's."""
        itemsize = np.dtype(dtype).itemsize
        content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, begin in self.offsets.items():
            shape = self.shapes[name]
            content[name] = {
                "dtype": _ENCODINGS[dtype],
                "shape": list(shape),
                "data_offsets": [begin, begin + math.prod(shape) * itemsize],
            }
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data is aligned to eight bytes
        return len(text).to_bytes(8, "little") + text


def cut(shapes: Mapping[str, Sequence[int]], itemsize: int, shard_bytes: int) -> list[Shard]:
    """Deals tensors out to shards in their order. Sizes in bytes."""
    groups: list[dict[str, int]] = [{}]
    ends = [0]
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * itemsize
        if groups[-1] and ends[-1] + nbytes > shard_bytes:
            groups.append({})
            ends.append(0)
        groups[-1][name] = ends[-1]
        ends[-1] += nbytes
    return [
        Shard(
            f"model-{number:05}-of-{len(groups):05}.safetensors",
            {name: tuple(shapes[name]) for name in offsets},
            offsets,
            end,
        )
        for number, (offsets, end) in enumerate(zip(groups, ends, strict=True), 1)
    ]


def _write_shards(
    reader: ParameterReader | MergedReader,
    card: Card,
    table: NameTable,
    shards: list[Shard],
    folder: Path,
    progress: Progress,
    chunk_bytes: int,
) -> None:
    shapes = parameter_shapes(card.model, card.dtype)

    def fill(piece: ParameterPiece, out: np.ndarray) -> None:
        reader.read(piece.parameter, piece.index, out.reshape(piece.shape))

    done, total = 0, stored_bytes(shapes)
    progress(done, total)
    with ExitStack() as stack:
        places: dict[str, tuple[FileIO, int]] = {}
        for shard in shards:
            file = stack.enter_context(FileIO(folder / shard.file, "w"))
            header = shard.header(card.dtype)
            file.write(header)
            for name, offset in shard.offsets.items():
                places[name] = (file, len(header) + offset)
        for piece, values in filled(pieces(shapes, chunk_bytes), np.dtype(card.dtype), fill):
            for row, start, within in overlaps(piece, table.by_parameter[piece.parameter]):
                # Under these names, a row is all of its tensor.
                file, offset = places[row.source]
                _write_at(file, offset + start * values.itemsize, values[within])
            done += values.nbytes
            progress(done, total)


def _write_at(file: FileIO, offset: int, values: np.ndarray) -> None:
    file.seek(offset)
    rest = values.view(np.uint8).data
    while rest:
        rest = rest[file.write(rest) :]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
