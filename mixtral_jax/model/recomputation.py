"""Recomputation: a gradient computes a layer again instead of keeping what is inside of it.

`jax.checkpoint` leaves the order to the compiler. XLA:CPU drops its barriers, recomputes layers
long before their slopes are there, and so keeps them all. Every compiler puts the gradient of an
adapter off, with all that it is a product of, while the backward pass goes on, and keeps what
attention and feed-forward gave in place of their sum, to sum it up once more.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

After = Callable[[jax.Array, Any], jax.Array]
Run = Callable[..., tuple[jax.Array, Any]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def recomputed(
    run: Run, after: After, x: jax.Array, beside: Any, *others: Any
) -> tuple[jax.Array, Any]:
    """`run(x, beside, *others)`, of which a gradient keeps the arguments only.

    Args:
        run: a layer, which closes over no array; returns its output and other values.
        after: of the kernels' record.
        x: the layer's input [...].
        beside: arrays whose gradients are computed before those of the layer's input are used.
        others: what else the layer reads, in any tree.
    """
    return run(x, beside, *others)


def _forward(
    run: Run, after: After, x: jax.Array, beside: Any, *others: Any
) -> tuple[tuple[jax.Array, Any], tuple[Any, ...]]:
    x = after(x, ())
    return run(x, beside, *others), (x, beside, *others)


def _backward(
    run: Run, after: After, arguments: tuple[Any, ...], slopes: tuple[jax.Array, Any]
) -> tuple[Any, ...]:
    x, *others = arguments
    with jax.named_scope("rematted_computation"):  # as jax.checkpoint names it in a program
        back = jax.vjp(run, after(x, slopes[0]), *others)[1]
    d_x, d_beside, *d_others = back(slopes)
    return after(d_x, d_beside), d_beside, *d_others


recomputed.defvjp(_forward, _backward)
