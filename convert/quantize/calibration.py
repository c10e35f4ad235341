"""Calibration: a text goes through a model's own blocks, one after the other, in f32.

A capture watches each block, so that whoever rounds its weights sees what they meet. One layer is
in memory at a time.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.errors import ConversionError
from convert.pieces import Fill, ParameterPiece, pieces
from convert.progress import Progress
from convert.quantize.kept import check_scales
from mixtral_jax.checkpoint.parameters import stored_bytes
from mixtral_jax.checkpoint.restore import aligned_memory
from mixtral_jax.checkpoint.writer import ParameterWriter
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.capture import Capture
from mixtral_jax.model.layers import RMSNorm, Rotary
from mixtral_jax.model.transformer import Block
from mixtral_jax.placement import Placement
from mixtral_jax.weight import INT8_GROUPS, Weight

_MOST_CHARACTERS = 1 << 20  # of a file; 32,768 tokens have fewer
_MAX_WINDOW = 512  # tokens that see each other

Arrays = dict[str, np.ndarray]
"""Parameters of a layer by their names within it, such as "attention.q.weight"."""


def calibration_text(path: Path | None = None) -> str:
    """Returns the beginning of a file's text; by default 105,000 characters written for this.

    Those are prose, dialogue, code, letters, lists and chats, some of them not in English.

    Raises ConversionError for a file that cannot be read, is no UTF-8, is empty or has zero bytes.
    """
    path = path or Path(__file__).with_name("calibration.txt")
    instead = "; give a file of text in UTF-8, or leave --calibration out"
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS)
    except UnicodeDecodeError:
        raise ConversionError([f"{path} is not in UTF-8{instead}"]) from None
    except OSError as error:
        raise ConversionError([f"{path} cannot be read: {error.strerror}{instead}"]) from None
    if "\0" in text:
        raise ConversionError([f"{path} has zero bytes, which no text has{instead}"])
    if not text.strip():
        raise ConversionError([f"{path} has no text in it{instead}"])
    return text


def whole(name: str, shape: tuple[int, ...], fill: Fill) -> np.ndarray:
    """Reads a whole parameter in float32."""
    values = aligned_memory(shape, np.float32)
    everything = ParameterPiece(name, tuple(map(slice, shape)), shape, 0)
    fill(everything, values.reshape(-1))
    return values


def windows(ids: list[int], config: ModelConfig) -> np.ndarray:
    """Cuts the ids into rows [B T] of equal length, which see nothing of each other."""
    count = -(-len(ids) // min(_MAX_WINDOW, config.max_context))
    return np.asarray(ids[: len(ids) // count * count]).reshape(count, -1)


class Rows(NamedTuple):
    """The inputs of a layer's products.

    `by_name` has f32 [T I] by the names of `Capture`: attention.qkv, attention.o, feed_forward.in.
    `down` [M F] are the rows of all experts, those of each together, and `sizes` [E] their numbers;
    a dense layer is one expert.
    """

    by_name: dict[str, jax.Array]
    down: jax.Array
    sizes: jax.Array


class Calibration:
    """The model's own block and last norm in float32, with the parameters of any layer."""

    def __init__(self, config: ModelConfig) -> None:
        placement = Placement.of(config, "float32", mesh=None)
        # No gradients are taken, so every kernel of the device may be used.
        kernels = placement.kernels
        every_kernel = frozenset(field.name for field in fields(kernels))
        placement = replace(placement, kernels=replace(kernels, differentiable=every_kernel))
        self._graph, state = nnx.split(Block(config, placement, rngs=None))
        self._state = dict(nnx.to_flat_state(state))
        self._norm = RMSNorm(config, placement, rngs=None)
        self._config = config
        self._run = jax.jit(self._traced)
        self._rows = jax.jit(
            lambda layer, x, name: self._traced(layer, x)[1].by_name[name], static_argnums=2
        )

    @property
    def names(self) -> list[str]:
        """The names of a layer's parameters."""
        return [".".join(map(str, path)) for path in self._state]

    def run(self, layer: Arrays, x: jax.Array) -> tuple[jax.Array, Rows]:
        """Computes a layer: x [B T D] -> [B T D], and the inputs of its products."""
        with jax.default_matmul_precision("highest"):
            x, rows = self._run({name: jax.device_put(layer[name]) for name in layer}, x)
        # On CPU the arrays of the device are those of `layer`, which is changed next.
        jax.block_until_ready((x, rows))
        return x, rows

    def rows(self, layer: Arrays, x: jax.Array, name: str) -> jax.Array:
        """The inputs f32 [T I] of a name of `Rows`; computes no more than those take."""
        with jax.default_matmul_precision("highest"):
            rows = self._rows({name: jax.device_put(layer[name]) for name in layer}, x, name)
        return jax.block_until_ready(rows)

    def normed(self, norm: np.ndarray, x: jax.Array) -> jax.Array:
        """Computes the model's last norm, of the weight [D]: x [B T D] -> [B T D]."""
        self._norm.weight.set_value(jnp.asarray(norm))
        return self._norm.full(x)

    def _traced(self, layer: Mapping[str, jax.Array], x: jax.Array) -> tuple[jax.Array, Rows]:
        values = zip(self._state.items(), layer.values(), strict=True)
        state = [(path, variable.replace(array)) for (path, variable), array in values]
        block: Block = nnx.merge(self._graph, nnx.from_flat_state(state))
        rotary = Rotary.at(jnp.arange(x.shape[1], dtype=jnp.int32)[None, :], self._config)
        capture = Capture(
            {
                "attention.qkv",
                "attention.o",
                "feed_forward.in",
                "feed_forward.down",
                "feed_forward.sizes",
            }
        )
        x = block.full(x, rotary, capture)
        inputs = {
            name: values.reshape(-1, values.shape[-1])
            for name, values in [
                (name, capture.values[name]) for name in ("attention.qkv", "feed_forward.in")
            ]
        }
        mixed = capture.values["attention.o"]
        inputs["attention.o"] = mixed.reshape(-1, self._config.num_heads * self._config.head_size)
        down = capture.values["feed_forward.down"]
        down = down.reshape(-1, down.shape[-1])
        sizes = capture.values.get("feed_forward.sizes", jnp.asarray([down.shape[0]]))
        return x, Rows(inputs, down, sizes)


class Output:
    """Writes parameters, rounding those that have scales, and reports the progress."""

    def __init__(self, writer: ParameterWriter, progress: Progress) -> None:
        self._writer = writer
        self._progress = progress
        self._done, self._total = 0, stored_bytes(writer.shapes)
        progress(self._done, self._total)

    def write(self, name: str, values: np.ndarray) -> None:
        """Writes a float32 parameter, chunk by chunk, and scales if it is int8 or int8x16."""
        scale_name = name.removesuffix("weight") + "scale"
        scale_shape = self._writer.shapes.get(scale_name)
        cut = pieces({name: self._writer.shapes[name]}, self._writer.chunk_bytes)
        if scale_shape is None:
            for piece in cut:
                self._put(name, piece.index, values[piece.index])
            return
        num_inputs = values.size // math.prod(scale_shape.shape)
        scale = np.empty(math.prod(scale_shape.shape), scale_shape.dtype)
        dtype = INT8_GROUPS if scale.dtype == np.float16 else "int8"
        for piece in cut:
            rows = jnp.asarray(values[piece.index].reshape(-1, num_inputs))
            rounded = Weight.quantized(rows, dtype)
            assert rounded.scale is not None
            first = piece.start // num_inputs
            scale[first : first + rounded.scale.size] = rounded.scale.reshape(-1)
            self._put(name, piece.index, np.asarray(rounded.values).reshape(piece.shape))
        self._put(scale_name, ..., scale.reshape(scale_shape.shape))

    def write_rounded(self, name: str, rounded: Weight) -> None:
        """Writes a weight and its scales as they are; they are reshaped to what is stored.

        Raises ConversionError where a scale is not finite.
        """
        assert rounded.scale is not None
        check_scales(name, np.asarray(rounded.scale))
        scale_name = name.removesuffix("weight") + "scale"
        for stored, values in ((name, rounded.values), (scale_name, rounded.scale)):
            self._put(stored, ..., np.asarray(values).reshape(self._writer.shapes[stored].shape))

    def _put(self, name: str, index: Any, values: np.ndarray) -> None:
        self._writer.write(name, index, values)
        self._done += values.nbytes
        self._progress(self._done, self._total)
