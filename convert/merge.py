"""merge: a checkpoint's weights with an adapter's matrices added to them, in float32.

W + scaling * BA is computed in float32 and rounded to the checkpoint's dtype. A short run of LoRA
changes weights by 1e-4 to 1e-3 of their size, of which bfloat16 keeps a part only, so how much is
lost is counted layer by layer. Memory does not grow with the model: two pieces of 32 MiB, what
their delta takes, and the adapter.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.check import check_space
from convert.errors import ConversionError
from convert.pieces import ParameterPiece, write_pieces
from convert.progress import Progress
from mixtral_jax.checkpoint.adapter import StoredAdapter, read_adapter
from mixtral_jax.checkpoint.folder import Card, finished_at
from mixtral_jax.checkpoint.parameters import CHUNK_BYTES, parameter_shapes
from mixtral_jax.checkpoint.writer import ParameterReader, ParameterWriter
from mixtral_jax.model.adapter import LowRank, adapter_letters, weight_name
from mixtral_jax.tokenization import tokenizer

FLOATS = ("float32", "bfloat16")
_ROUNDED = (
    "{path} is stored as {dtype}, where W + BA would be rounded anew with other scales, and int8 "
    "without the smoothing that the base had: serve the adapter beside it instead, or convert the "
    "weights with --dtype bfloat16, merge, export and convert that with --dtype {dtype}"
)


@dataclass
class LayerChange:
    """The change that an adapter makes to one layer's weights, and what rounding leaves of it.

    Args:
        layer: counted from 0.
        weights: the number of weights that have an adapter.
        changed: the number of them that differ after the merge.
        squares: the sum of squares of scaling * BA.
        lost_squares: likewise of its difference from what the stored weights changed by.
    """

    layer: int
    weights: int = 0
    changed: int = 0
    squares: float = 0.0
    lost_squares: float = 0.0

    @property
    def size(self) -> float:
        """The root mean square of scaling * BA."""
        return math.sqrt(self.squares / self.weights) if self.weights else 0.0

    @property
    def error(self) -> float:
        """The part of the change that rounding loses: 0 for none, in the root of squares."""
        return math.sqrt(self.lost_squares / self.squares) if self.squares else 0.0


@dataclass(frozen=True)
class Merged:
    """The card of a merged checkpoint, and the change to each layer."""

    card: Card
    layers: tuple[LayerChange, ...]

    @property
    def worst(self) -> LayerChange:
        """The layer that loses the largest part of its change."""
        return max(self.layers, key=lambda layer: layer.error)


class MergedReader:
    """Reads a checkpoint's parameters with an adapter's matrices added to their weights.

    Args:
        checkpoint: a checkpoint folder of a float dtype.
        card: its card.
        stored: the adapter.
    """

    def __init__(self, checkpoint: Path, card: Card, stored: StoredAdapter) -> None:
        self._reader = ParameterReader(checkpoint)
        self._dtype = np.dtype(card.dtype)
        self._scaling = np.float32(stored.settings.scaling)
        self._pairs: dict[str, tuple[int, LowRank, tuple[str, str]]] = {}
        for layer, target, low in stored.adapter.pairs():
            name = f"layers.{layer}.{weight_name(target)}"
            self._pairs[name] = (layer, low, adapter_letters(target, card.model))
        self.layers = tuple(LayerChange(i) for i in range(card.model.num_layers))

    @classmethod
    def open(cls, checkpoint: Path, adapter: Path) -> "MergedReader":
        """Reads an adapter's folder for the checkpoint; raises as `merge` does."""
        card = Card.read(checkpoint)
        check_is_float(checkpoint, card)
        return cls(checkpoint, card, read_adapter(adapter, card.model))

    def read(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out`, of any float dtype, with the merged values of a parameter at `index`.

        What is lost by rounding to that dtype is added to `layers`; each piece is read once.
        """
        stored = out if out.dtype == self._dtype else np.empty(out.shape, self._dtype)
        self._reader.read(name, index, stored)
        if name not in self._pairs:
            if stored is not out:
                out[...] = stored.astype(out.dtype)
            return
        layer, low, letters = self._pairs[name]
        base = stored.astype(np.float32)
        delta = self._scaling * delta_at(low, letters, index)
        out[...] = (base + delta).astype(out.dtype)
        change = self.layers[layer]
        applied = out.astype(np.float32)
        applied -= base
        change.weights += out.size
        change.changed += int(np.count_nonzero(applied))
        change.squares += _sum_of_squares(delta)
        delta -= applied
        change.lost_squares += _sum_of_squares(delta)
        if not math.isfinite(change.lost_squares):
            raise ConversionError([f"{name} is not finite after the adapter is added to it"])


def delta_at(low: LowRank, letters: tuple[str, str], index: tuple[slice, ...]) -> np.ndarray:
    """Returns BA of a weight at `index` [*E *O *I] in float32; `letters` are those of A and B."""
    a, b = (np.asarray(array) for array in low)
    num_experts = letters[0].startswith("E")
    num_outputs = len(letters[1]) - 1 - num_experts
    experts, rows = index[:num_experts], index[num_experts : num_experts + num_outputs]
    columns = index[num_experts + num_outputs :]
    whole = slice(None)
    a, b = a[(*experts, whole, *columns)], b[(*experts, *rows, whole)]
    shape = (*b.shape[:-1], *a.shape[num_experts + 1 :])
    lead, rank = a.shape[:num_experts], b.shape[-1]
    product = np.matmul(b.reshape(*lead, -1, rank), a.reshape(*lead, rank, -1))
    return product.reshape(shape)


def _sum_of_squares(values: np.ndarray) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def merge(
    checkpoint: Path,
    adapter: Path,
    destination: Path,
    *,
    dtype: str | None = None,
    name: str | None = None,
    progress: Progress = lambda done, total: None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Merged:
    """Writes a checkpoint folder with an adapter merged into its weights.

    Args:
        checkpoint: the base, of a float dtype.
        adapter: a folder of PEFT's form.
        destination: a folder that does not exist or is empty.
        dtype: float32 or bfloat16; by default the base's.
        name: the name under which the result is served; by default the folder's.
        progress: called with bytes written and bytes in all.
        chunk_bytes: bytes of a stored chunk.

    Raises ConfigError if `checkpoint` is none, AdapterError for an adapter that is broken or does
    not fit, ConversionError for int8 and fp8 or too little room, and FileExistsError if
    `destination` is not empty. Nothing is left there then.
    """
    base = Card.read(checkpoint)
    check_is_float(checkpoint, base)
    if dtype is not None and dtype not in FLOATS:
        raise ConversionError(
            [
                f"an adapter is merged as {' or '.join(FLOATS)}, not as {dtype}; export "
                f"what was merged and convert that with --dtype {dtype}"
            ]
        )
    stored = read_adapter(adapter, base.model)
    card = Card(
        model=base.model,
        dtype=dtype or base.dtype,
        name=name or destination.absolute().name,
        provider=base.provider,
    )
    shapes = parameter_shapes(card.model, card.dtype)
    check_space(shapes, destination)
    reader = MergedReader(checkpoint, base, stored)

    def fill(piece: ParameterPiece, out: np.ndarray) -> None:
        reader.read(piece.parameter, piece.index, out.reshape(piece.shape))

    with finished_at(destination) as partial:
        writer = ParameterWriter(partial, shapes, chunk_bytes)
        write_pieces(writer, np.dtype(card.dtype), fill, progress)
        tokenizer.copy(checkpoint, partial)
        card.write(partial)
    return Merged(card, reader.layers)


def check_is_float(checkpoint: Path, card: Card) -> None:
    """Raises ConversionError if a checkpoint is int8 or fp8, into which nothing is merged."""
    if card.dtype not in FLOATS:
        raise ConversionError([_ROUNDED.format(path=checkpoint, dtype=card.dtype)])


def summary(layers: tuple[LayerChange, ...], dtype: str) -> Iterator[str]:
    """Yields lines that say what rounding to `dtype` leaves of the change, worst layer last."""
    yield "layer  rms of the change  weights unchanged  change lost"
    changes = [layer for layer in layers if layer.weights]
    for layer in changes:
        same = 1 - layer.changed / layer.weights
        yield f"{layer.layer:5}  {layer.size:17.2e}  {same:17.1%}  {layer.error:11.1%}"
    if changes:
        worst = max(changes, key=lambda layer: layer.error)
        remedy = "" if dtype == "float32" else "; --dtype float32 keeps it"
        yield f"{dtype} loses most in layer {worst.layer}: {worst.error:.1%} of its change{remedy}"
