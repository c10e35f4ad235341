"""Products, norm and SwiGLU in XLA: the meaning of every other maker's."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.weight import Weight, round_rows

# y[M, out] = x[M, in] @ w[E, out, in]^T, rows of x in E groups: contracts the weight's last axis.
_GROUPED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
# x[M, in] = y[M, out] @ w[E, out, in]: the same weights the other way, for gradients.
_GROUPED_BACK = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def linear(x: jax.Array, weights: Sequence[Weight]) -> list[jax.Array]:
    """Products of the same rows with several weights: x [R I], weights [O I] -> one [R O] each."""
    return [product(x, weight) for weight in weights]


def product(x: jax.Array, weight: Weight) -> jax.Array:
    """x [R I] -> [R O] for a weight [O I], in the dtype of x.

    The gradient of an int8 product passes straight through the rounding of x (arXiv:1308.3432), as
    if the product were `x @ (values * scale)^T`; int8 values themselves have none.
    """
    if weight.scale is None:
        return jnp.einsum("RI,OI->RO", x, weight.values)
    return _product_int8(x, weight.values, weight.scale)


@jax.custom_vjp
def _product_int8(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    rows, x_scale = round_rows(x)
    # XLA:CPU has no fast path for fewer than eight rows of int8.
    rows = jnp.pad(rows, ((0, max(0, 8 - x.shape[0])), (0, 0)))
    total = jnp.einsum("RI,OI->RO", rows, values, preferred_element_type=jnp.int32)
    total = total[: x.shape[0]].astype(jnp.float32)
    return (total * (x_scale[:, None] * scale[None, :])).astype(x.dtype)


_Int8Residuals = tuple[jax.Array, jax.Array, jax.Array]


def _product_int8_forward(
    x: jax.Array, values: jax.Array, scale: jax.Array
) -> tuple[jax.Array, _Int8Residuals]:
    return _product_int8(x, values, scale), (x, values, scale)


def _product_int8_backward(
    residuals: _Int8Residuals, dy: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
    x, values, scale = residuals
    scaled = (dy.astype(jnp.float32) * scale[None, :]).astype(dy.dtype)
    dx = jnp.einsum("RO,OI->RI", scaled, values.astype(dy.dtype))
    # Computed only where somebody asks for it: jit drops what is not used.
    unscaled = _product_int8(x.astype(jnp.float32), values, jnp.ones_like(scale))
    return dx, None, jnp.sum(dy.astype(jnp.float32) * unscaled, axis=0)


_product_int8.defvjp(_product_int8_forward, _product_int8_backward)


def grouped(x: jax.Array, sizes: jax.Array, weight: Weight) -> jax.Array:
    """Rows in E groups, each against its own expert: x [M I], sizes [E], weight [E O I] -> [M O].

    Rows behind the last group have unspecified values, and a gradient of zero. That of int8 is as
    in `product`.
    """
    if weight.scale is None:
        return jax.lax.ragged_dot_general(x, weight.values, sizes, _GROUPED)
    return _grouped_int8(x, sizes, weight.values, weight.scale)


@jax.custom_vjp
def _grouped_int8(x: jax.Array, sizes: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    rows, x_scale = round_rows(x)
    total = jax.lax.ragged_dot_general(
        rows, values, sizes, _GROUPED, preferred_element_type=jnp.int32
    )
    scale = scale[expert_of_row(sizes, x.shape[0])]
    return (total.astype(jnp.float32) * (x_scale[:, None] * scale)).astype(x.dtype)


_GroupedInt8Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _grouped_int8_forward(
    x: jax.Array, sizes: jax.Array, values: jax.Array, scale: jax.Array
) -> tuple[jax.Array, _GroupedInt8Residuals]:
    return _grouped_int8(x, sizes, values, scale), (x, sizes, values, scale)


def _grouped_int8_backward(
    residuals: _GroupedInt8Residuals, dy: jax.Array
) -> tuple[jax.Array, None, None, jax.Array]:
    x, sizes, values, scale = residuals
    expert = expert_of_row(sizes, len(x))
    is_used = jnp.arange(len(x))[:, None] < jnp.sum(sizes)
    wide = jnp.where(is_used, dy.astype(jnp.float32), 0)
    scaled = (wide * scale[expert]).astype(dy.dtype)
    dx = jax.lax.ragged_dot_general(scaled, values.astype(dy.dtype), sizes, _GROUPED_BACK)
    # Computed only where somebody asks for it: jit drops what is not used.
    unscaled = _grouped_int8(x.astype(jnp.float32), sizes, values, jnp.ones_like(scale))
    d_scale = gradient_of_scales(wide, unscaled, sizes)
    return jnp.where(is_used, dx, jnp.zeros((), dx.dtype)), None, None, d_scale


_grouped_int8.defvjp(_grouped_int8_forward, _grouped_int8_backward)


def gradient_of_scales(slope: jax.Array, unscaled: jax.Array, sizes: jax.Array) -> jax.Array:
    """The gradient of scales [E O]: slopes [M O] by the rounded product without scales [M O]."""
    is_used = jnp.arange(len(slope))[:, None] < jnp.sum(sizes)
    share = jnp.where(is_used, slope.astype(jnp.float32) * unscaled, 0)
    scales = jnp.zeros((sizes.shape[0], slope.shape[1]), jnp.float32)
    return scales.at[expert_of_row(sizes, len(slope))].add(share)


def gradient_of_experts(slope: jax.Array, x: jax.Array, sizes: jax.Array) -> jax.Array:
    """The gradient of a float weight [E O I] of `grouped`: slopes [M O] and rows x [M I].

    The thinner of the two is spread over the experts, so one product sums up what is in the groups:
    thin for an adapter's matrices. It computes E times what a grouped product would.
    """
    is_used = jnp.arange(len(slope))[:, None] < jnp.sum(sizes)
    expert = jax.nn.one_hot(expert_of_row(sizes, len(slope)), sizes.shape[0], dtype=slope.dtype)
    expert = jnp.where(is_used, expert, jnp.zeros((), expert.dtype))
    # Rows behind the last group are unspecified, and 0 x NaN is NaN.
    slope, x = (jnp.where(is_used, array, jnp.zeros((), array.dtype)) for array in (slope, x))
    if slope.shape[1] <= x.shape[1]:
        return jnp.einsum("MEO,MI->EOI", jnp.einsum("ME,MO->MEO", expert, slope), x)
    return jnp.einsum("MO,MEI->EOI", slope, jnp.einsum("ME,MI->MEI", expert, x))


def no_gradient(values: jax.Array) -> Any:
    """The gradient of an array of integers, as JAX takes it: zeros of the dtype float0."""
    return np.zeros(values.shape, jax.dtypes.float0)


def expert_of_row(sizes: jax.Array, rows: int) -> jax.Array:
    """The group of each row: sizes [E] -> [M] i32; rows behind the last group have the last's."""
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right")
    return jnp.minimum(expert, sizes.shape[0] - 1)


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last axis of x [*R D], normalised in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + (-1,))


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up for arrays [*R F] (arXiv:2002.05202)."""
    return jax.nn.silu(gate) * up


def router_input(x: jax.Array) -> jax.Array:
    """The rows that the router multiplies: x itself."""
    return x
