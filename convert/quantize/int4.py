"""int4: from float weights to four bits in groups of 32 inputs.

Activations are smoothed as for int8 (convert/quantize/int8.py), because rows that meet int4 on CPU
are rounded to int8. Then the weights of a layer are rounded, those that meet the same rows
together, for the rows that the text has behind all that is int4 already
(convert/quantize/compensation.py). The text goes through the float model too, whose products are
what the rounded ones are to give. For o and down, whose products are added to the hidden states,
what those lack is to be given back as well, so that errors do not grow from layer to layer. A token
may choose other experts in the rounded model, so down of experts is rounded for its own rows alone.
Embedding and head are int8.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert.pieces import Fill
from convert.progress import Progress
from convert.quantize.calibration import Arrays, Calibration
from convert.quantize.compensation import Rounder, moment
from convert.quantize.int8 import ALPHA, Walk, by_layers, channels, smooth_layer
from mixtral_jax.checkpoint.writer import ParameterWriter
from mixtral_jax.config import ModelConfig
from mixtral_jax.weight import QUANTIZED, Weight

# The more tokens a model is rounded by, the better. It is rounded by so many that the rows of down,
# the largest, have 2^27 elements (512 MiB), as 9,362 tokens have with the widths of Mistral-7B; but
# at least by 8,192, with which those of Mixtral-8x7B are 896 MiB, and at most by 32,768.
_MIN_TOKENS, _MAX_TOKENS, _MAX_ROWS = 8192, 32768, 1 << 27
# The weights that meet the same rows, by the names of `Rows`, in the order in which they do.
_TOGETHER = {
    "attention.qkv": ("attention.q", "attention.k", "attention.v"),
    "attention.o": ("attention.o",),
    "feed_forward.in": ("feed_forward.gate", "feed_forward.up"),
    "feed_forward.down": ("feed_forward.down",),
}


def mixed(config: ModelConfig) -> dict[str, str]:
    """The weights that lose most in int4, as int8: `weight_dtypes` of a model of both.

    They are v and down of the first and the last eighth of the layers and of each third between.
    The choice is that of llama.cpp's Q4_K_M.
    """
    layers = config.num_layers
    eighth = layers // 8
    chosen = [
        i for i in range(layers) if i < eighth or i >= layers - eighth or (i - eighth) % 3 == 2
    ]
    names = ("attention.v", "feed_forward.down")
    return {f"layers.{i}.{name}": "int8" for i in chosen for name in names}


def num_tokens(config: ModelConfig) -> int:
    """The number of tokens of a text by which a model is rounded, if the text has so many."""
    width = config.feed_forward_size * max(config.experts_per_token, 1)
    return min(max(_MAX_ROWS // width, _MIN_TOKENS), _MAX_TOKENS)


def quantize(
    config: ModelConfig,
    fill: Fill,
    ids: list[int],
    writer: ParameterWriter,
    progress: Progress = lambda done, total: None,
    alpha: float | None = ALPHA,
    compensates: bool = True,
) -> None:
    """Reads all float weights by `fill` and writes those of an int4 model.

    Args:
        config: of the model, its embeddings not tied.
        fill: puts elements of a float32 parameter into an array.
        ids: of the calibration text, at least one; the first `num_tokens` are used.
        writer: of parameters of an int4 model.
        progress: called with bytes written and bytes in all.
        alpha: as in `int8.quantize`.
        compensates: whether weights make up for each other; if not, each is rounded to the nearest.
    """

    exact: jax.Array | None = None  # the float model's hidden states

    def round_and_write(walk: Walk, prefix: str, layer: Arrays, x: jax.Array) -> jax.Array:
        nonlocal exact
        run = walk.calibration.run
        smooth_layer(layer, channels(run(layer, x)[1]), config, alpha)
        floats = _Floats.of(walk.calibration, layer, x if exact is None else exact)
        is_int4 = {name: writer.shapes[prefix + name].dtype == QUANTIZED["int4"] for name in layer}
        for name, values in layer.items():
            if not is_int4[name]:
                walk.output.write(prefix + name, values)
        for kind, together in _TOGETHER.items():
            names = [name for name in (f"{short}.weight" for short in together) if is_int4[name]]
            if not names:
                continue
            met = _met(kind, walk.calibration, layer, x, floats, config)
            for name, rounded in _rounded(names, layer, met, config, compensates):
                walk.output.write_rounded(prefix + name, rounded)
                values = np.asarray(rounded.widened(jnp.float32))
                layer[name] = values.reshape(layer[name].shape)
            del met  # it is large, and what comes next is too
        exact = floats.behind
        return run(layer, x)[0]

    by_layers(config, fill, ids[: num_tokens(config)], writer, progress, alpha, round_and_write)


class _Floats(NamedTuple):
    """The text at a layer of the float model: hidden states f32 [B T D] before and behind it."""

    before: jax.Array
    behind: jax.Array
    rows: dict[str, jax.Array]
    """`by_name` of `Rows`; who has read some takes them out."""

    @classmethod
    def of(cls, calibration: Calibration, layer: Arrays, before: jax.Array) -> "_Floats":
        """Computes a layer of float parameters."""
        behind, rows = calibration.run(layer, before)
        return cls(before, behind, rows.by_name)


class _Met(NamedTuple):
    """The rows that some weights of a layer meet, and how their products are to differ."""

    rows: list[jax.Array]
    """f32 [T I]; of each expert, where experts have their own."""
    drift: jax.Array | None = None
    """f32 [I I], `moment` of what they lack of the float model's; None where those are not
    compared."""
    added: jax.Array | None = None
    """f32 [O I], `moment` of what the products are to have besides."""

    def lacking(self, matrix: np.ndarray) -> jax.Array | None:
        """Returns `moment` f32 [O I] of what a matrix's products with the rows lack, if anything.

        What each product lacks is not computed, because it would have all outputs of all experts.
        """
        if self.drift is None:
            return self.added
        with jax.default_matmul_precision("highest"):
            lacking = jnp.asarray(matrix) @ self.drift
        return lacking if self.added is None else lacking + self.added


def _met(
    kind: str,
    calibration: Calibration,
    layer: Arrays,
    x: jax.Array,
    floats: _Floats,
    config: ModelConfig,
) -> _Met:
    """Computes the rows of a name of `_TOGETHER` behind the weights that are rounded already.

    Args:
        kind: the name.
        calibration: of the model.
        layer: the layer's parameters, the rounded ones among them.
        x: f32 [B T D], what the layers before leave.
        floats: the float model's text at this layer.
        config: the model's.
    """
    if kind != "feed_forward.down":
        rows = calibration.rows(layer, x, kind)
        added = None
        if kind == "attention.o":
            added = moment((floats.before - x).reshape(len(rows), -1), rows)
        return _Met([rows], moment(floats.rows.pop(kind) - rows, rows), added)
    behind, every = calibration.run(layer, x)
    if config.is_moe:
        return _Met(jnp.split(every.down, np.cumsum(every.sizes)[:-1]))
    lacking = (floats.behind - behind).reshape(len(every.down), -1)
    return _Met([every.down], added=moment(lacking, every.down))


def _rounded(
    names: list[str], layer: Arrays, met: _Met, config: ModelConfig, compensates: bool
) -> Iterator[tuple[str, Weight]]:
    """Rounds weights f32 [*E *O *I] of a layer that meet the same rows, to int4 [E O I]."""
    rows = [own if compensates else own[:0] for own in met.rows]
    shared = Rounder(rows[0]) if len(rows) == 1 else None
    for name in names:
        experts = config.num_experts if config.is_moe and name.startswith("feed_forward.") else 1
        matrices = layer[name].reshape(experts, -1, rows[0].shape[1])
        rounded = [
            # Where experts have their own rows, no two have a rounder at a time: it is large.
            (shared or Rounder(rows[expert])).rounded(matrix, met.lacking(matrix))
            for expert, matrix in enumerate(matrices)
        ]
        del matrices  # the floats, which the caller replaces
        yield name, jax.tree.map(lambda *arrays: jnp.stack(arrays), *rounded)
