"""Products of low-rank adapters in XLA, each row with an adapter of its own.

Of several adapters beside one weight, each row uses one or none: its group. Two forms, equal up to
rounding: for few columns one product with the A of all groups, of which each row keeps its own
group's columns, and one with all B, which an accelerator computes faster than it gathers matrices
for each row; for many columns, as experts with an adapter each have, grouped products.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_MOST_MASKED = 512  # columns of all groups together
# [M I] with [G U I] over I, and [M U] with [G U O] over U, rows in G groups.
_SHRINK = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
_EXPAND = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def add_low_rank(
    ys: Sequence[jax.Array],
    x: jax.Array,
    groups: jax.Array,
    lows: Sequence[tuple[jax.Array, jax.Array]],
) -> list[jax.Array]:
    """y + (x A^T) B of each row's group, for several weights that meet the same rows.

    Args:
        ys: what the weights themselves give, [R O] each.
        x: [R I].
        groups: [R] i32, of each row; a row whose group is negative keeps its y bit for bit.
        lows: A [G U I] and B [G U O] beside each weight, in the dtype of x.
    """
    has_group = (groups >= 0)[:, None]
    return [
        jnp.where(has_group, y + _delta(x, groups, a, b).astype(y.dtype), y)
        for y, (a, b) in zip(ys, lows, strict=True)
    ]


def _delta(x: jax.Array, groups: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    count = a.shape[0]
    if count * a.shape[1] <= _MOST_MASKED:
        columns = jnp.einsum("RI,GUI->RGU", x, a)
        is_own = groups[:, None] == jnp.arange(count, dtype=groups.dtype)[None, :]
        own = jnp.where(is_own[:, :, None], columns, jnp.zeros((), columns.dtype))
        return jnp.einsum("RGU,GUO->RO", own, b)
    known = jnp.where(groups >= 0, groups, count)
    order = jnp.argsort(known, stable=True)
    sizes = jnp.bincount(known, length=count)
    columns = jax.lax.ragged_dot_general(x[order], a, sizes, _SHRINK)
    sums = jax.lax.ragged_dot_general(columns, b, sizes, _EXPAND)
    return jnp.zeros_like(sums).at[order].set(sums, unique_indices=True)
