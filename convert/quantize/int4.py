"""int4: from float weights to four bits in groups of 32 inputs, with what rounding one loses made
up for by the others.

Rounding each weight to the nearest value of its grid adds 37 % to SmolLM2-135M's perplexity,
because the errors of an output's weights add up along whatever its inputs have in common. GPTQ
(arXiv:2210.17323) rounds one input after the other and moves those inputs' weights that are not yet
rounded by as much as makes up for the error, in the least squares of the products with the rows
that a text shows:

    H = X^T X + damping          of the rows X [T I]
    U = the upper Cholesky factor of H^-1
    error_i = (w_i - rounded w_i) / U_ii;    w_j -= error_i * U_ij for the j behind i

The inputs with the largest rows come first, while there are others to make up for them. Grids are
those of the weights as they were, so nothing has to be permuted. Inputs are taken 2,048 at a time:
H of all 14,336 of a Mixtral's would be as large as its layer.

Before, activations are smoothed as for int8 (convert/quantize/int8.py), because rows that meet
int4 on CPU are rounded to int8. Embedding and head are int8. Each layer sees the text as the
rounded layers before it leave it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.pieces import Fill
from convert.progress import Progress
from convert.quantize.calibration import Arrays, Rows
from convert.quantize.int8 import ALPHA, Walk, by_layers, channels, smooth_layer
from mixtral_jax.checkpoint.writer import ParameterWriter
from mixtral_jax.config import ModelConfig
from mixtral_jax.weight import GROUP_SIZE, QUANTIZED, Grid, Weight, nearest_level, packed

_DAMPING = 0.01  # the paper's: this share of H's mean diagonal is added to the diagonal
_MOST_INPUTS = 2048  # that make up for each other


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
        ids: of the calibration text, at least one; the first 2,048 are used.
        writer: of parameters of an int4 model.
        progress: called with bytes written and bytes in all.
        alpha: as in `int8.quantize`.
        compensates: whether weights make up for each other; if not, each is rounded to the nearest.
    """

    def round_and_write(walk: Walk, prefix: str, layer: Arrays, x: jax.Array) -> jax.Array:
        _, rows = walk.calibration.run(layer, x)
        smooth_layer(layer, channels(rows), config, alpha)
        _, rows = walk.calibration.run(layer, x)
        for name, values in layer.items():
            if writer.shapes[prefix + name].dtype != QUANTIZED["int4"]:
                walk.output.write(prefix + name, values)
                continue
            rounded = rounded_weight(name, values, rows, config, compensates)
            walk.output.write_rounded(prefix + name, rounded)
            layer[name] = np.array(rounded.widened(jnp.float32)).reshape(values.shape)
        return walk.calibration.run(layer, x)[0]

    by_layers(config, fill, ids, writer, progress, alpha, round_and_write)


def rounded_weight(
    name: str, values: np.ndarray, rows: Rows, config: ModelConfig, compensates: bool = True
) -> Weight:
    """Rounds a weight of a layer: values [*E *O *I] -> int4 [*E O I].

    Args:
        name: within the layer, such as "attention.q.weight".
        values: float32.
        rows: what the layer's weights meet.
        config: the model's.
        compensates: as in `quantize`.
    """
    experts = config.num_experts if name.startswith("feed_forward.") and config.is_moe else 0
    inputs = values.shape[-1]
    if name == "attention.o.weight":
        inputs *= values.shape[-2]
    flat = values.reshape(max(1, experts), -1, inputs)
    rounded = [
        _rounded(matrix, _rows_of(name, expert, rows), compensates)
        for expert, matrix in enumerate(flat)
    ]
    if not experts:
        return rounded[0]
    scales = [weight.scale for weight in rounded if weight.scale is not None]
    return Weight(jnp.stack([weight.values for weight in rounded]), jnp.stack(scales))


def _rows_of(name: str, expert: int, rows: Rows) -> np.ndarray:
    """The rows f32 [T I] that a weight of a layer, or one of its experts', meets."""
    match name.split("."):
        case ["attention", "o", _]:
            return np.asarray(rows.by_name["attention.o"])
        case ["attention", *_]:
            return np.asarray(rows.by_name["attention.qkv"])
        case ["feed_forward", "down", _]:
            ends = np.cumsum(np.asarray(rows.sizes))
            return np.asarray(rows.down[ends[expert] - rows.sizes[expert] : ends[expert]])
    return np.asarray(rows.by_name["feed_forward.in"])


def _rounded(weight: np.ndarray, rows: np.ndarray, compensates: bool) -> Weight:
    """Rounds a weight [O I] for rows [T I]; without rows, each of its values to the nearest."""
    if not compensates or not rows.any():
        return Weight.quantized(jnp.asarray(weight), "int4")
    parts = [
        compensated(weight[:, start : start + _MOST_INPUTS], rows[:, start : start + _MOST_INPUTS])
        for start in range(0, weight.shape[1], _MOST_INPUTS)
    ]
    levels, pairs = zip(*parts, strict=True)
    return Weight(packed(jnp.concatenate(levels, axis=1)), jnp.concatenate(pairs, axis=1))


def compensated(weight: np.ndarray, rows: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Rounds a weight f32 [O I] so that its products with rows f32 [T I] change least.

    Returns its levels u8 [O I] and the pairs of its grid f16 [O I/32 2].
    """
    sizes = np.mean(np.square(rows), axis=0)
    order = np.argsort(-sizes, kind="stable")
    sorted_rows = rows[:, order].astype(np.float64)
    h = sorted_rows.T @ sorted_rows / len(rows)
    h[np.diag_indices_from(h)] += _DAMPING * sizes.mean()
    factor = np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)
    grid = Grid.of(jnp.asarray(weight), jnp.asarray(sizes))
    levels = _in_turn(jnp.asarray(weight), grid, jnp.asarray(order), jnp.asarray(factor))
    return levels, grid.pairs


@jax.jit
def _in_turn(weight: jax.Array, grid: Grid, order: jax.Array, factor: jax.Array) -> jax.Array:
    """The levels u8 [O I] of a weight whose inputs are rounded in an order [I]; U is f32 [I I]."""
    outputs, inputs = weight.shape
    scale, minimum = (array[:, order].T for array in grid.by_input)
    index = jnp.arange(inputs)

    def block(carry: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[Any, None]:
        """Rounds some inputs, and then lets all behind them make up for it at once."""
        rest, levels = carry
        own = jax.lax.dynamic_slice_in_dim(rest, start, GROUP_SIZE)
        rows = jax.lax.dynamic_slice_in_dim(factor, start, GROUP_SIZE)
        corner = jax.lax.dynamic_slice_in_dim(rows, start, GROUP_SIZE, axis=1)

        def step(
            i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            own, errors, levels = state
            grid_of_input = scale[start + i], minimum[start + i]
            level = nearest_level(own[i], *grid_of_input)
            error = (own[i] - (level * grid_of_input[0] + grid_of_input[1])) / corner[i, i]
            own = own - jnp.where(index[:GROUP_SIZE] > i, corner[i], 0)[:, None] * error[None, :]
            return own, errors.at[i].set(error), levels.at[start + i].set(level.astype(jnp.uint8))

        zeros = jnp.zeros((GROUP_SIZE, outputs), jnp.float32)
        _, errors, levels = jax.lax.fori_loop(0, GROUP_SIZE, step, (own, zeros, levels))
        behind = jnp.where(index[None, :] >= start + GROUP_SIZE, rows, 0)
        change = jnp.einsum("BI,BO->IO", behind, errors, precision="highest")
        return (rest - change, levels), None

    levels = jnp.zeros((inputs, outputs), jnp.uint8)
    starts = jnp.arange(0, inputs, GROUP_SIZE)
    (_, levels), _ = jax.lax.scan(block, (weight[:, order].T, levels), starts)
    return jnp.zeros((outputs, inputs), jnp.uint8).at[:, order].set(levels.T)
