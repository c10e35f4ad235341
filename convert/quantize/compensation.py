"""Rounding to int4 with what it loses made up for by the weights that are rounded later.

Rounding each weight to the nearest value of its grid adds 39 % to SmolLM2-135M's perplexity,
because the errors of an output's weights add up along whatever its inputs have in common. GPTQ
(arXiv:2210.17323) rounds one input after the other and moves those inputs' weights that are not yet
rounded by as much as makes up for the error, in the least squares of the products with the rows
that a text shows:

    H = X^T X / T      of the rows X [T I], with a larger diagonal
    U = the upper Cholesky factor of H^-1
    error_i = (w_i - rounded w_i) / U_ii;    w_j -= error_i * U_ij for the j behind i

The inputs with the largest rows come first, while there are others to make up for them. Grids are
those of the weights before the first of them is rounded, so nothing has to be permuted. (To fit
them anew to the levels, by least squares, takes a tenth off the squared error of the text's own
rows, and makes other texts worse.)

Products may lack something before any weight is rounded, because the rows come from rounded layers
(arXiv:2504.02692, arXiv:2504.09629). The weights then first move by what fits it best:

    W += M H^-1      M = L^T X / T, of a share L [T O] of what the products of W with X lack

Only moments of the rows are kept: of some inputs with each other, and with those behind them.
Inputs are taken 2,048 at a time, because H of all 14,336 of down's and its inverse would take
3.3 GB in float64. What the products lack when some are rounded is for the next to make up for.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.weight import GROUP_SIZE, Grid, Weight, nearest_level, packed

# A short text shows more in common between two inputs than there is: H's diagonal grows by this
# share of itself. (GPTQ's 1 % of its mean is next to nothing for most inputs where a few are large.
# In trials on two texts SmolLM2-135M had 6.3 and 6.7 % more perplexity with 10 % of the mean, and
# 4.0 and 6.2 % so.)
_SHRINKAGE = 0.2
_DAMPING = 0.001  # and by this share of its mean, so that inputs of 0 can be divided by
_SHARE = 0.5  # of the best fit to a text, which is a short one; arXiv:2504.09629 takes it too
_MOST_INPUTS = 2048  # that make up for each other


class Rounder:
    """Rounds weights that all meet the same rows."""

    def __init__(self, rows: jax.Array) -> None:
        """Prepares for rows f32 [T I]; without any, each weight goes to the nearest value."""
        starts = range(0, rows.shape[1], _MOST_INPUTS) if jnp.any(rows) else ()
        self._blocks = [_Block.of(rows, start) for start in starts]

    def rounded(self, weight: np.ndarray, lacking: jax.Array | None = None) -> Weight:
        """Rounds a weight f32 [O I] so that its products with the rows have half of what they lack.

        Args:
            weight: finite.
            lacking: f32 [O I], `moment` of what they lack with the rows; None where they lack
                nothing.
        """
        if not self._blocks:
            return Weight.quantized(jnp.asarray(weight), "int4")
        rest = jnp.asarray(weight)
        lacking = jnp.zeros_like(rest) if lacking is None else _SHARE * lacking
        levels, pairs = [], []
        for block in self._blocks:
            count = len(block.order)
            own, rest = rest[:, :count], rest[:, count:]
            its_levels, grid = block.rounded(own, lacking[:, :count])
            with jax.default_matmul_precision("highest"):
                lacking = lacking[:, count:] - (grid.values(its_levels) - own) @ block.behind
            levels.append(its_levels)
            pairs.append(grid.pairs)
        return Weight(packed(jnp.concatenate(levels, axis=1)), jnp.concatenate(pairs, axis=1))


def moment(values: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns values^T rows / T, f32 [V I], of values [T V] that stand beside rows [T I]."""
    with jax.default_matmul_precision("highest"):
        return values.T @ rows / len(rows)


class _Block(NamedTuple):
    """Some inputs that make up for each other."""

    sizes: jax.Array
    """f32 [I], the mean square of each input."""
    order: jax.Array
    """[I], in which they are rounded."""
    inverse: jax.Array
    """f32 [I I], of H."""
    factor: jax.Array
    """f32 [I I], U of the inputs in their order."""
    behind: jax.Array
    """f32 [I R], their moments with the inputs behind them."""

    @classmethod
    def of(cls, rows: jax.Array, start: int) -> "_Block":
        """Prepares the inputs from `start` on, of rows f32 [T start+I+R]."""
        own = rows[:, start : start + _MOST_INPUTS]
        # Block by block, because a copy of all the rows behind would be large.
        others = range(start + _MOST_INPUTS, rows.shape[1], _MOST_INPUTS)
        behind = [moment(own, rows[:, other : other + _MOST_INPUTS]) for other in others]
        sizes = np.asarray(jnp.mean(jnp.square(own), axis=0))
        order = np.argsort(-sizes, kind="stable")
        h = np.asarray(moment(own, own), np.float64)
        h[np.diag_indices_from(h)] += _SHRINKAGE * sizes + _DAMPING * (sizes.mean() or 1.0)
        inverse = np.linalg.inv(h)
        factor = np.linalg.cholesky(inverse[np.ix_(order, order)]).T
        return cls(
            sizes=jnp.asarray(sizes),
            order=jnp.asarray(order),
            inverse=jnp.asarray(inverse.astype(np.float32)),
            factor=jnp.asarray(factor.astype(np.float32)),
            behind=jnp.concatenate([jnp.zeros((len(sizes), 0)), *behind], axis=1),
        )

    def rounded(self, weight: jax.Array, lacking: jax.Array) -> tuple[jax.Array, Grid]:
        """The levels u8 [O I] of a weight [O I], and their grid; lacking is M [O I]."""
        with jax.default_matmul_precision("highest"):
            weight = weight + lacking @ self.inverse
        grid = Grid.of(weight, self.sizes)
        return _in_turn(weight, grid, self.order, self.factor), grid


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
