"""The order of a gradient's work: a layer is recomputed when its slopes are there, not before.

A compiler that recomputes all layers at once keeps what is inside of all of them.
"""

import jax

# What an array waits for: other arrays, in any tree.
Causes = object


def after(x: jax.Array, causes: Causes) -> jax.Array:
    """x [...] itself, for uses that come after the causes are computed."""
    held: jax.Array = jax.lax.optimization_barrier((x, causes))[0]
    return held


def after_by_value(x: jax.Array, causes: Causes) -> jax.Array:
    """`after` for XLA:CPU, which drops barriers before it decides about the order.

    x [...] of floats and nought times a number of each cause. A cause that is not finite makes x
    NaN: slopes and gradients, which end that step anyhow.
    """
    for cause in jax.tree.leaves(causes):
        x = x + (cause[(0,) * cause.ndim] * 0).astype(x.dtype).reshape((1,) * x.ndim)
    return after(x, causes)
