"""Products of rows in groups on GPU, with their gradient, around a form's own kernel."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.weight import Weight, round_rows

# (x [M I], sizes [E], weights [E O I], scales, dtype, interpret, is_gradient) -> [M O] of dtype;
# as a gradient, slopes [M O] -> [M I]. The scales are those of rows [M] and of outputs [E O] where
# both x and the weights are int8, those of outputs alone where the weights are fp8, and none for
# floats and in a gradient. Weights of another dtype than x are widened to it.
TilesOf = Callable[
    [jax.Array, jax.Array, jax.Array, tuple[jax.Array, ...], jnp.dtype, bool, bool], jax.Array
]
_Residuals = tuple[jax.Array, jax.Array, Weight]


def grouped_by(
    tiles_of: TilesOf,
    x: Float[jax.Array, "M I"],
    sizes: Int[jax.Array, " E"],
    weight: Weight,
    *,
    interpret: bool,
) -> Float[jax.Array, "M O"]:
    """`xla.grouped` by the kernel `tiles_of`: x [M I] -> [M O].

    The gradient of x is by the same kernel; that of a float weight, for which training adapters
    never asks, by XLA. int8 as in `xla.product`; fp8 is widened, tile by tile, to the dtype of x.
    """
    return _grouped(tiles_of, interpret, x, sizes.astype(jnp.int32), weight)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(
    tiles_of: TilesOf, interpret: bool, x: jax.Array, sizes: jax.Array, weight: Weight
) -> jax.Array:
    if weight.scale is None:
        return tiles_of(x, sizes, weight.values, (), x.dtype, interpret, False)
    if weight.is_fp8:
        return tiles_of(x, sizes, weight.values, (weight.scale,), x.dtype, interpret, False)
    rows, x_scale = round_rows(x)
    scales = (x_scale, weight.scale)
    return tiles_of(rows, sizes, weight.values, scales, x.dtype, interpret, False)


def _grouped_forward(
    tiles_of: TilesOf, interpret: bool, x: jax.Array, sizes: jax.Array, weight: Weight
) -> tuple[jax.Array, _Residuals]:
    return _grouped(tiles_of, interpret, x, sizes, weight), (x, sizes, weight)


def _grouped_backward(
    tiles_of: TilesOf, interpret: bool, residuals: _Residuals, slope: jax.Array
) -> tuple[jax.Array, None, Weight]:
    x, sizes, weight = residuals
    is_used = jnp.arange(len(x), dtype=jnp.int32)[:, None] < jnp.sum(sizes)
    scaled = slope
    if weight.scale is not None:
        of_row = weight.scale[xla.expert_of_row(sizes, len(x))]
        scaled = (slope.astype(jnp.float32) * of_row).astype(slope.dtype)
    dx = tiles_of(scaled, sizes, weight.values, (), x.dtype, interpret, True)
    dx = jnp.where(is_used, dx, jnp.zeros((), dx.dtype))
    if weight.scale is None:
        dw = xla.gradient_of_experts(slope, x, sizes).astype(weight.values.dtype)
        return dx, None, Weight(dw, None)
    ones = Weight(weight.values, jnp.ones_like(weight.scale))
    unscaled = _grouped(tiles_of, interpret, x.astype(jnp.float32), sizes, ones)
    d_scale = xla.gradient_of_scales(slope, unscaled, sizes)
    none: Any = None if weight.is_fp8 else xla.no_gradient(weight.values)
    return dx, None, Weight(none, d_scale)


_grouped.defvjp(_grouped_forward, _grouped_backward)
