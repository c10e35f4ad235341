"""Functions without a gradient say so by their names, wherever jax.grad meets them."""

from functools import partial
from typing import NoReturn

import jax


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def without_gradient(name: str, x: jax.Array) -> jax.Array:
    """Returns x; a gradient through it raises NotImplementedError, which names the function."""
    return x


def _forward(name: str, x: jax.Array) -> NoReturn:
    raise NotImplementedError(
        f"{name} has no gradient: it is a form of serving. Train by the model's full form, "
        "model(tokens) or model.hidden(tokens)"
    )


def _backward(name: str, residuals: None, slope: jax.Array) -> tuple[jax.Array]:
    return (slope,)


without_gradient.defvjp(_forward, _backward)
