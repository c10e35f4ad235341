"""int8: from float weights to int8 with one scale for each output (W8A8), smoothed.

A few channels of a model's activations are far larger than the others, and one scale for a whole
row of them leaves the others few steps. SmoothQuant (arXiv:2211.10438) divides channel j by

    s_j = |x_j|^alpha / |w_j|^(1 - alpha)

and multiplies column j of the weights that it meets by the same, which changes no product. |.| is
the root mean square, where the paper takes the largest: its scales are for whole tensors, ours for
rows and outputs, and a third less is lost (Kullback-Leibler divergence 0.010 instead of 0.015 from
SmolLM2-135M's answers in float32). Those of x come from 2,048 tokens of text. Dividing costs
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

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert.pieces import Fill
from convert.progress import Progress
from convert.quantize.calibration import Arrays, Calibration, Output, Rows, whole, windows
from mixtral_jax.checkpoint.parameters import parameter_shapes
from mixtral_jax.checkpoint.writer import ParameterWriter
from mixtral_jax.config import ModelConfig

ALPHA = 0.5  # the paper's, for most models
_MAX_TOKENS = 2048  # of the text


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

    def smooth_and_write(walk: Walk, prefix: str, layer: Arrays, x: jax.Array) -> jax.Array:
        x, rows = walk.calibration.run(layer, x)
        smooth_layer(layer, channels(rows), config, alpha)
        for name, values in layer.items():
            walk.output.write(prefix + name, values)
        return x

    by_layers(config, fill, ids[:_MAX_TOKENS], writer, progress, alpha, smooth_and_write)


class Walk(NamedTuple):
    """The means of `by_layers` while it goes through a model."""

    calibration: Calibration
    output: Output


def by_layers(
    config: ModelConfig,
    fill: Fill,
    ids: list[int],
    writer: ParameterWriter,
    progress: Progress,
    alpha: float | None,
    write_layer: Callable[[Walk, str, Arrays, jax.Array], jax.Array],
) -> None:
    """Writes a model whose layers are rounded by `write_layer`, and smooths its head.

    `write_layer` is given the beginning of the layer's names, its float32 parameters, which it may
    change, and the text's hidden states [B T D] before the layer; it writes all of them and returns
    the hidden states behind it. The other arguments are those of `quantize`.
    """
    shapes = parameter_shapes(config, "float32")
    walk = Walk(Calibration(config), Output(writer, progress))

    def read(name: str) -> np.ndarray:
        return whole(name, shapes[name].shape, fill)

    embed = read("embed.weight")
    x = jnp.asarray(embed[windows(ids, config)])
    walk.output.write("embed.weight", embed)
    del embed
    for i in range(config.num_layers):
        prefix = f"layers.{i}."
        layer = {name: read(prefix + name) for name in walk.calibration.names}
        x = write_layer(walk, prefix, layer, x)
        del layer
    norm, head = read("norm.weight"), read("head.weight")
    smooth_head(norm, head, walk.calibration.normed(norm, x), alpha)
    walk.output.write("norm.weight", norm)
    walk.output.write("head.weight", head)


def channels(rows: Rows) -> Arrays:
    """Returns how large each channel of a layer's inputs is: f32 [I], of `down` [E F]."""
    by_name = {name: np.asarray(_channels(values)) for name, values in rows.by_name.items()}
    down = _channels_of_groups(rows.down, jnp.asarray(rows.sizes))
    return by_name | {"feed_forward.down": np.asarray(down)}


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


def smooth_head(norm: np.ndarray, head: np.ndarray, x: jax.Array, alpha: float | None) -> None:
    """Moves sizes of channels from the last norm's output x [*R D] to the head, in place.

    Args:
        norm: f32 [D], the weight of the last norm.
        head: f32 [V D].
        x: f32, what the norm makes of the calibration text.
        alpha: as in `quantize`.
    """
    s = smoothing(np.asarray(_channels(x)), _columns(head), alpha)
    norm /= s
    head *= s


def smooth_layer(
    layer: Arrays, inputs: Mapping[str, np.ndarray], config: ModelConfig, alpha: float | None
) -> None:
    """Moves sizes of channels from a layer's activations to its weights, in place.

    Args:
        layer: the layer's float32 parameters.
        inputs: the channels of its products' inputs, see `channels`.
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
