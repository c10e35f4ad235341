"""Products with int4 weights by a maker's own kernel, which widens them on the chip.

Rows are floats of 16 bits, and weights are rounded to their dtype (W4A16), as in XLA's form. Rows
of float32 go by that form, which rounds them to int8 (W4A8). Gradients are those of widened
weights: of experts by the maker's own product with floats, of dense ones by XLA.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.weight import Weight

# (x [M I], sizes [E], weight [E O I], interpret) -> [M O] of the dtype of x. Without sizes there is
# one expert, whose rows are all of them.
TilesOf = Callable[[jax.Array, jax.Array | None, Weight, bool], jax.Array]
# A maker's `grouped`, which takes `interpret` as well.
Grouped = Callable[..., jax.Array]


def linear_by(
    tiles_for: Callable[[jax.Array, jax.Array], TilesOf | None],
    x: Float[jax.Array, "R I"],
    weights: Sequence[Weight],
    *,
    interpret: bool,
    rounds_to_fp8: bool = False,
) -> list[jax.Array]:
    """`xla.linear` with int4 weights by the kernel for rows [R I] and values [O I/2], if any."""

    def product(weight: Weight) -> jax.Array:
        if weight.is_int4 and _takes_rows(x):
            tiles_of = tiles_for(x, weight.values)
            if tiles_of is not None:
                return _product(tiles_of, interpret, x, weight)
        return xla.product(x, weight, rounds_to_fp8=rounds_to_fp8)

    return [product(weight) for weight in weights]


def grouped_by(
    tiles_of: TilesOf,
    of_floats: Grouped,
    x: Float[jax.Array, "M I"],
    sizes: Int[jax.Array, " E"],
    weight: Weight,
    *,
    interpret: bool,
) -> Float[jax.Array, "M O"]:
    """`xla.grouped` with int4 experts [E O I] by a kernel, beside the maker's own with floats."""
    if not _takes_rows(x):
        return xla.grouped(x, sizes, weight)
    return _grouped(tiles_of, of_floats, interpret, x, sizes.astype(jnp.int32), weight)


def _takes_rows(x: jax.Array) -> bool:
    """Says whether rows meet int4 as floats of 16 bits."""
    return x.dtype in (jnp.bfloat16, jnp.float16)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(tiles_of: TilesOf, interpret: bool, x: jax.Array, weight: Weight) -> jax.Array:
    assert weight.scale is not None
    return tiles_of(x, None, Weight(weight.values[None], weight.scale[None]), interpret)


def _product_forward(
    tiles_of: TilesOf, interpret: bool, x: jax.Array, weight: Weight
) -> tuple[jax.Array, tuple[jax.Array, Weight]]:
    return _product(tiles_of, interpret, x, weight), (x, weight)


def _product_backward(
    tiles_of: TilesOf, interpret: bool, residuals: tuple[jax.Array, Weight], slope: jax.Array
) -> Any:
    return xla.product_in_groups_backward(residuals, slope)


_product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _grouped(
    tiles_of: TilesOf,
    of_floats: Grouped,
    interpret: bool,
    x: jax.Array,
    sizes: jax.Array,
    weight: Weight,
) -> jax.Array:
    return tiles_of(x, sizes, weight, interpret)


_Residuals = tuple[jax.Array, jax.Array, Weight]


def _grouped_forward(
    tiles_of: TilesOf,
    of_floats: Grouped,
    interpret: bool,
    x: jax.Array,
    sizes: jax.Array,
    weight: Weight,
) -> tuple[jax.Array, _Residuals]:
    return _grouped(tiles_of, of_floats, interpret, x, sizes, weight), (x, sizes, weight)


def _grouped_backward(
    tiles_of: TilesOf, of_floats: Grouped, interpret: bool, residuals: _Residuals, slope: jax.Array
) -> tuple[jax.Array, None, Weight]:
    x, sizes, weight = residuals

    def widened(x: jax.Array, scale: jax.Array) -> jax.Array:
        wide = Weight(weight.values, scale).widened(x.dtype)
        return of_floats(x, sizes, Weight(wide, None), interpret=interpret)

    assert weight.scale is not None
    dx, d_scale = jax.vjp(widened, x, weight.scale)[1](slope)
    return dx, None, Weight(xla.no_gradient(weight.values), d_scale)


_grouped.defvjp(_grouped_forward, _grouped_backward)
