"""Few rows against int4 weights on GPU, for cards and versions of jax without a kernel of ours.

A product is written as a sum, into which XLA fuses the widening, so weights are read as they lie.
Every row is computed by itself: two that meet the same weight widen it twice.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float

from mixtral_jax.kernels import int4
from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.weight import GROUP_SIZE, Weight

# Up to so many rows this takes less time than writing and reading widened weights: of a dense one,
# or of all experts.
MOST_DENSE, MOST_GROUPED = 4, 16


def linear(x: Float[jax.Array, "R I"], weights: Sequence[Weight]) -> list[Float[jax.Array, "R O"]]:
    """`xla.linear`, with int4 read as it lies where rows are few."""
    return int4.linear_by(_tiles_for, x, weights, interpret=False)


def linear_in_fp8(
    x: Float[jax.Array, "R I"], weights: Sequence[Weight]
) -> list[Float[jax.Array, "R O"]]:
    """`xla.linear_in_fp8` likewise, on cards that multiply fp8."""
    return int4.linear_by(_tiles_for, x, weights, interpret=False, rounds_to_fp8=True)


def _tiles_for(x: jax.Array, values: jax.Array) -> int4.TilesOf | None:
    return tiles_of if x.shape[0] <= MOST_DENSE else None


def tiles_of(x: jax.Array, sizes: jax.Array | None, weight: Weight, interpret: bool) -> jax.Array:
    """`int4.TilesOf`."""
    del interpret  # it is no kernel
    rows, inputs = x.shape
    assert weight.scale is not None
    expert = jnp.zeros(1, jnp.int32) if sizes is None else xla.expert_of_row(sizes, rows)
    in_group = GROUP_SIZE // 2
    values = weight.values[expert].reshape(len(expert), -1, inputs // GROUP_SIZE, in_group)
    pairs = weight.scale[expert].astype(jnp.float32)
    met = x.reshape(rows, 1, -1, in_group, 2).astype(jnp.float32)
    halves = (values & jnp.uint8(15), values >> jnp.uint8(4))
    sums = [_wide(half, pairs, x) * met[..., turn] for turn, half in enumerate(halves)]
    return jnp.sum(sums[0] + sums[1], axis=(2, 3)).astype(x.dtype)


def _wide(levels: jax.Array, pairs: jax.Array, x: jax.Array) -> jax.Array:
    """Weights as other forms multiply them: rounded to the dtype of the rows, and then float32."""
    wide = levels.astype(jnp.float32) * pairs[..., :1] + pairs[..., 1:]
    return wide.astype(x.dtype).astype(jnp.float32)
