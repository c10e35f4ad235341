"""int8: from float weights to int8 with one scale for each output (W8A8), smoothed.

A few channels of a model's activations are far larger than the others, and one scale for a whole
row of them leaves the others few steps. SmoothQuant (arXiv:2211.10438) divides channel j by

    s_j = |x_j|^alpha / |w_j|^(1 - alpha)

and multiplies column j of the weights that it meets by the same, which changes no product. |.| is
the root mean square, where the paper takes the largest: its scales are for whole tensors, ours for
rows and outputs, and a third less is lost (Kullback-Leibler divergence 0.010 instead of 0.015 from
SmolLM2-135M's answers in float32). Those of x come from a short text of ours. Dividing costs
nothing when the model runs, for it is done to the weights of whatever makes the activations:

    q, k, v              the norm before them
    o                    the rows of v; query heads that share a head of v share its s
    gate, up of all      the norm before them; the router is multiplied to make up for it
      experts, router
    down                 the rows of up, in each expert
    head                 the last norm; so a head tied to the embedding becomes one of its own

The text goes through the model's own blocks, one after the other in f32, which a capture watches;
each is then smoothed, rounded and written. One layer is in memory at a time.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.pieces import Fill, ParameterPiece, pieces
from convert.progress import Progress
from mixtral_jax.checkpoint.parameters import parameter_shapes, stored_bytes
from mixtral_jax.checkpoint.restore import aligned_memory
from mixtral_jax.checkpoint.writer import ParameterWriter
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.capture import Capture
from mixtral_jax.model.layers import RMSNorm, Rotary
from mixtral_jax.model.transformer import Block
from mixtral_jax.placement import Placement
from mixtral_jax.weight import Weight

ALPHA = 0.5  # the paper's, for most models
_MAX_TOKENS = 2048  # of the text
_MAX_WINDOW = 512  # tokens that see each other

Arrays = dict[str, np.ndarray]
"""Parameters of a layer by their names within it, such as "attention.q.weight"."""


def calibration_text() -> str:
    """Returns prose, dialogue, code and a chat: 8,000 characters that were written for this."""
    return Path(__file__).with_name("calibration.txt").read_text(encoding="utf-8")


def quantize(
    config: ModelConfig,
    fill: Fill,
    ids: list[int],
    writer: ParameterWriter,
    progress: Progress = lambda done, total: None,
    alpha: float | None = ALPHA,
) -> None:
    """Reads all float weights by `fill` and writes those of an int8 model.

    Args:
        config: of the model, its embeddings not tied.
        fill: puts elements of a float32 parameter into an array.
        ids: of the calibration text, at least one; the first 2,048 are used.
        writer: of parameters of an int8 model; for float32 ones, smooths and does not round.
        progress: called with bytes written and bytes in all.
        alpha: how much of the difficulty goes from activations to weights; None does not smooth.
    """
    shapes = parameter_shapes(config, "float32")
    output = _Output(writer, progress)
    calibration = _Calibration(config)

    def read(name: str) -> np.ndarray:
        shape = shapes[name].shape
        values = aligned_memory(shape, np.float32)
        everything = ParameterPiece(name, tuple(map(slice, shape)), shape, 0)
        fill(everything, values.reshape(-1))
        return values

    embed = read("embed.weight")
    x = jnp.asarray(embed[_windows(ids, config)])
    output.write("embed.weight", embed)
    del embed
    for i in range(config.num_layers):
        prefix = f"layers.{i}."
        layer = {name: read(prefix + name) for name in calibration.names}
        x, inputs = calibration.run(layer, x)
        smooth_layer(layer, inputs, config, alpha)
        for name, values in layer.items():
            output.write(prefix + name, values)
        del layer
    norm, head = read("norm.weight"), read("head.weight")
    s = smoothing(calibration.normed_channels(norm, x), _columns(head), alpha)
    output.write("norm.weight", norm / s)
    head *= s
    output.write("head.weight", head)


def _windows(ids: list[int], config: ModelConfig) -> np.ndarray:
    """Cuts the ids into rows [B T] of equal length, which see nothing of each other."""
    ids = ids[:_MAX_TOKENS]
    count = -(-len(ids) // min(_MAX_WINDOW, config.max_context))
    return np.asarray(ids[: len(ids) // count * count]).reshape(count, -1)


class _Calibration:
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

    @property
    def names(self) -> list[str]:
        """The names of a layer's parameters."""
        return [".".join(map(str, path)) for path in self._state]

    def run(self, layer: Arrays, x: jax.Array) -> tuple[jax.Array, Arrays]:
        """Computes a layer: x [B T D] -> [B T D], and the channels of its products' inputs.

        These are f32, by the names of `Capture`: attention.qkv [D], attention.o [N*H],
        feed_forward.in [D], and feed_forward.down [E F], where a dense layer has one expert.
        """
        with jax.default_matmul_precision("highest"):
            x, inputs = self._run({name: jax.device_put(layer[name]) for name in layer}, x)
        # On CPU the arrays of the device are those of `layer`, which is changed next.
        jax.block_until_ready(x)
        return x, {name: np.asarray(values) for name, values in inputs.items()}

    def normed_channels(self, norm: np.ndarray, x: jax.Array) -> np.ndarray:
        """Returns the channels [D] of the last norm's output, for x [B T D]."""
        self._norm.weight.set_value(jnp.asarray(norm))
        return np.asarray(_channels(self._norm.full(x)))

    def _traced(
        self, layer: Mapping[str, jax.Array], x: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
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
        inputs = capture.values
        down = inputs.pop("feed_forward.down")
        rows = down.reshape(-1, down.shape[-1])
        sizes = inputs.pop("feed_forward.sizes", jnp.asarray([rows.shape[0]]))
        mixed = inputs["attention.o"]
        inputs["attention.o"] = mixed.reshape(*mixed.shape[:2], -1)
        channels = {name: _channels(values) for name, values in inputs.items()}
        return x, channels | {"feed_forward.down": _channels_of_groups(rows, sizes)}


def _channels(x: jax.Array) -> jax.Array:
    """Returns the root mean square of each channel: x [*R I] -> [I]."""
    return jnp.sqrt(jnp.mean(jnp.square(x.reshape(-1, x.shape[-1])), axis=0))


def _channels_of_groups(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """Returns the channels of rows [M I] that are sorted into E groups, [E I]; of no rows, 0."""
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    totals = jax.ops.segment_sum(jnp.square(x), group, num_segments=sizes.shape[0])
    return jnp.sqrt(totals / jnp.maximum(1, sizes).astype(jnp.float32)[:, None])


def _columns(weight: np.ndarray) -> np.ndarray:
    """Returns the root mean square of each column: weight [*E O I] -> [*E I]."""
    return np.sqrt(np.einsum("...OI,...OI->...I", weight, weight) / np.float32(weight.shape[-2]))


def smoothing(inputs: np.ndarray, columns: np.ndarray, alpha: float | None) -> np.ndarray:
    """Returns the divisor of each channel [I]: 1 in the geometric mean, and where nothing was seen.

    Args:
        inputs: f32 [I], how large each channel of the activations is.
        columns: f32 [I], how large each column of the weight is.
        alpha: as in `quantize`.
    """
    s = np.ones_like(inputs)
    seen = (inputs > 0) & (columns > 0)
    if alpha is not None and seen.any():
        logs = alpha * np.log(inputs[seen]) - (1 - alpha) * np.log(columns[seen])
        s[seen] = np.exp(logs - logs.mean())
    return s


def smooth_layer(
    layer: Arrays, inputs: Mapping[str, np.ndarray], config: ModelConfig, alpha: float | None
) -> None:
    """Moves sizes of channels from a layer's activations to its weights, in place.

    Args:
        layer: the layer's float32 parameters.
        inputs: the channels of its products' inputs, see `_Calibration.run`.
        config: the model's.
        alpha: as in `quantize`.
    """
    q, k, v, o = (layer[f"attention.{name}.weight"] for name in "qkvo")
    D = config.hidden_size
    columns = np.maximum.reduce([_columns(weight.reshape(-1, D)) for weight in (q, k, v)])
    s = smoothing(inputs["attention.qkv"], columns, alpha)
    layer["attention_norm.weight"] /= s
    for weight in (q, k, v):
        weight *= s
    # The query heads that share a head of v share its divisors: [K G H] -> [K H].
    groups = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_size)
    largest_inputs = np.max(inputs["attention.o"].reshape(groups), axis=1)
    largest_columns = np.max(_columns(o.reshape(D, -1)).reshape(groups), axis=1)
    s_v = smoothing(largest_inputs, largest_columns, alpha)
    v /= s_v[..., None]
    o *= np.broadcast_to(s_v[:, None], groups).reshape(config.num_heads, config.head_size)

    gate, up, down = (layer[f"feed_forward.{name}.weight"] for name in ("gate", "up", "down"))
    columns = np.maximum(
        *(_columns(weight.reshape(-1, *weight.shape[-2:])) for weight in (gate, up))
    )
    s = smoothing(inputs["feed_forward.in"], np.max(columns, axis=0), alpha)
    layer["feed_forward_norm.weight"] /= s
    gate *= s
    up *= s
    if config.is_moe:
        layer["feed_forward.router.weight"] *= s
    for expert, seen in enumerate(inputs["feed_forward.down"]):
        own_up, own_down = (up[expert], down[expert]) if config.is_moe else (up, down)
        s_down = smoothing(seen, _columns(own_down), alpha)
        own_up /= s_down[:, None]
        own_down *= s_down


class _Output:
    """Writes parameters, rounding those that have scales, and reports the progress."""

    def __init__(self, writer: ParameterWriter, progress: Progress) -> None:
        self._writer = writer
        self._progress = progress
        self._done, self._total = 0, stored_bytes(writer.shapes)
        progress(self._done, self._total)

    def write(self, name: str, values: np.ndarray) -> None:
        """Writes a float32 parameter, chunk by chunk, and its scales if it is stored as int8."""
        scale_name = name.removesuffix("weight") + "scale"
        scale_shape = self._writer.shapes.get(scale_name)
        cut = pieces({name: self._writer.shapes[name]}, self._writer.chunk_bytes)
        if scale_shape is None:
            for piece in cut:
                self._put(name, piece.index, values[piece.index])
            return
        num_inputs = values.size // math.prod(scale_shape.shape)
        scale = np.empty(math.prod(scale_shape.shape), np.float32)
        for piece in cut:
            rounded = Weight.quantized(jnp.asarray(values[piece.index].reshape(-1, num_inputs)))
            assert rounded.scale is not None
            first = piece.start // num_inputs
            scale[first : first + rounded.scale.size] = rounded.scale
            self._put(name, piece.index, np.asarray(rounded.values).reshape(piece.shape))
        self._put(scale_name, ..., scale.reshape(scale_shape.shape))

    def _put(self, name: str, index: Any, values: np.ndarray) -> None:
        self._writer.write(name, index, values)
        self._done += values.nbytes
        self._progress(self._done, self._total)
