"""Products, norm and SwiGLU in XLA: the meaning of every other maker's."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.weight import (
    GROUP_SIZE,
    INT8_GROUP_SIZE,
    Weight,
    round_rows,
    round_rows_fp8,
    unpacked,
)

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


def linear_in_fp8(x: jax.Array, weights: Sequence[Weight]) -> list[jax.Array]:
    """`linear` on devices that multiply fp8: its rows are rounded to fp8 as well (W8A8)."""
    return [product(x, weight, rounds_to_fp8=True) for weight in weights]


def product(x: jax.Array, weight: Weight, *, rounds_to_fp8: bool = False) -> jax.Array:
    """x [R I] -> [R O] for a weight [O I], in the dtype of x.

    The rows that meet int8 are rounded to it. Those that meet fp8 stay as they are, and the weight
    is widened to their dtype, which is exact, unless `rounds_to_fp8`; sums are float32. Weights in
    groups are as weight.py says.

    The gradient passes straight through the rounding of x (arXiv:1308.3432), as if the product were
    `x @ (values * scale)^T`; rounded values themselves have none.
    """
    if weight.scale is None:
        return jnp.einsum("RI,OI->RO", x, weight.values)
    if weight.is_in_groups:
        by_dtype = _product_in_groups if x.dtype == jnp.float32 else _product_of_floats
        return by_dtype(x, weight)
    return _product_scaled(rounds_to_fp8, x, weight.values, weight.scale)


def _factors(
    rounds_to_fp8: bool, x: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Rows and values as they are multiplied, of one dtype, and the scales of rounded rows [R]."""
    if values.dtype == jnp.int8:
        rows, scale = round_rows(x)
        return rows, values, scale
    if rounds_to_fp8:
        rows, scale = round_rows_fp8(x)
        return rows, values, scale
    return x, values.astype(x.dtype), None


def _sums_of(rows: jax.Array) -> Any:
    """The dtype in which products of such rows are summed up."""
    return jnp.int32 if rows.dtype == jnp.int8 else jnp.float32


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product_scaled(
    rounds_to_fp8: bool, x: jax.Array, values: jax.Array, scale: jax.Array
) -> jax.Array:
    rows, values, x_scale = _factors(rounds_to_fp8, x, values)
    if rows.dtype == jnp.int8:
        # XLA:CPU has no fast path for fewer than eight rows of int8.
        rows = jnp.pad(rows, ((0, max(0, 8 - x.shape[0])), (0, 0)))
    total = jnp.einsum("RI,OI->RO", rows, values, preferred_element_type=_sums_of(rows))
    total = total[: x.shape[0]].astype(jnp.float32)
    factor = scale[None, :] if x_scale is None else x_scale[:, None] * scale[None, :]
    return (total * factor).astype(x.dtype)


_Residuals = tuple[jax.Array, jax.Array, jax.Array]


def _product_scaled_forward(
    rounds_to_fp8: bool, x: jax.Array, values: jax.Array, scale: jax.Array
) -> tuple[jax.Array, _Residuals]:
    return _product_scaled(rounds_to_fp8, x, values, scale), (x, values, scale)


def _product_scaled_backward(
    rounds_to_fp8: bool, residuals: _Residuals, dy: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
    x, values, scale = residuals
    scaled = (dy.astype(jnp.float32) * scale[None, :]).astype(dy.dtype)
    dx = jnp.einsum("RO,OI->RI", scaled, values.astype(dy.dtype))
    # Computed only where somebody asks for it: jit drops what is not used.
    ones = jnp.ones_like(scale)
    unscaled = _product_scaled(rounds_to_fp8, x.astype(jnp.float32), values, ones)
    return dx, None, jnp.sum(dy.astype(jnp.float32) * unscaled, axis=0)


_product_scaled.defvjp(_product_scaled_forward, _product_scaled_backward)


def _product_of_floats(x: jax.Array, weight: Weight) -> jax.Array:
    """The product of rows [R I] with a weight [O I] in groups that is widened to their dtype."""
    wide = jnp.float32
    if not weight.is_int4:
        y = jnp.einsum("RI,OI->RO", x, weight.widened(x.dtype), preferred_element_type=wide)
        return y.astype(x.dtype)
    parts = [
        jnp.einsum("RI,OI->RO", x[:, turn::2], half, preferred_element_type=wide)
        for turn, half in enumerate(weight.halves(x.dtype))
    ]
    return (parts[0] + parts[1]).astype(x.dtype)


@jax.custom_vjp
def _product_in_groups(x: jax.Array, weight: Weight) -> jax.Array:
    def multiply(rows: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.einsum("RI,OI->RO", rows, values, preferred_element_type=jnp.int32)

    return _sum_of_groups(x, weight, multiply, lambda of_outputs: of_outputs[None, :])


def _sum_of_groups(
    x: jax.Array,
    weight: Weight,
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    of_rows: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Rows [R I] rounded to int8 by a weight [*E O I] in groups, group by group: [R O].

    A row is rounded by a scale for each group: a few inputs of a model are far larger than others.

    Args:
        x: float32.
        weight: of int4 or int8x16.
        multiply: rows i8 [R G] and values i8 [*E O G] of a group -> i32 [R O].
        of_rows: scales or minima f32 [*E O] -> those of each row, [R O] or [1 O].
    """
    weight = weight.in_rows()
    assert weight.scale is not None
    size = GROUP_SIZE if weight.is_int4 else INT8_GROUP_SIZE
    rows, x_scale = round_rows(x.reshape(x.shape[0], -1, size))
    values = unpacked(weight.values).astype(jnp.int8) if weight.is_int4 else weight.values
    values = values.reshape(*values.shape[:-1], -1, size)

    def add(total: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        row, row_scale, value, scales = group
        dots = multiply(row, value).astype(jnp.float32)
        if weight.is_int4:
            scale, minimum = (of_rows(scales[..., i].astype(jnp.float32)) for i in range(2))
            sums = jnp.sum(row, axis=-1, dtype=jnp.int32).astype(jnp.float32)
            added = dots * scale + sums[:, None] * minimum
        else:
            added = dots * of_rows(scales.astype(jnp.float32))
        return total + added * row_scale[:, None], None

    total = jnp.zeros((x.shape[0], weight.values.shape[-2]), jnp.float32)
    of_groups = -2 if weight.is_int4 else -1  # the axis of groups in scales
    by_axis = ((rows, 1), (x_scale, 1), (values, -2), (weight.scale, of_groups))
    groups = tuple(jnp.moveaxis(array, axis, 0) for array, axis in by_axis)
    return jax.lax.scan(add, total, groups)[0]


def _product_in_groups_forward(x: jax.Array, weight: Weight) -> tuple[jax.Array, Any]:
    return _product_in_groups(x, weight), (x, weight)


def product_in_groups_backward(residuals: tuple[jax.Array, Weight], dy: jax.Array) -> Any:
    """The gradients of rows and of the scales of a weight in groups: as if rows were floats."""
    return _floats_backward(_product_of_floats, residuals, dy)


def _floats_backward(
    product: Callable[[jax.Array, Weight], jax.Array],
    residuals: tuple[jax.Array, Weight],
    dy: jax.Array,
) -> Any:
    x, weight = residuals

    def of_floats(x: jax.Array, scale: jax.Array) -> jax.Array:
        return product(x, Weight(weight.values, scale))

    dx, d_scale = jax.vjp(of_floats, x, weight.scale)[1](dy)
    return dx, Weight(no_gradient(weight.values), d_scale)


_product_in_groups.defvjp(_product_in_groups_forward, product_in_groups_backward)


def grouped(x: jax.Array, sizes: jax.Array, weight: Weight) -> jax.Array:
    """Rows in E groups, each against its own expert: x [M I], sizes [E], weight [E O I] -> [M O].

    Rows behind the last group have unspecified values, and a gradient of zero. int8 and fp8 are as
    in `product`; the experts of fp8 are widened for the product, so rows are not rounded to it.
    """
    if weight.scale is None:
        return jax.lax.ragged_dot_general(x, weight.values, sizes, _GROUPED)
    if weight.is_in_groups:
        by_dtype = _grouped_in_groups if x.dtype == jnp.float32 else _grouped_of_floats
        return by_dtype(x, sizes, weight)
    return _grouped_scaled(x, sizes, weight.values, weight.scale)


def grouped_int8_groups(
    of_floats: Callable[[jax.Array, jax.Array, Weight], jax.Array],
    x: jax.Array,
    sizes: jax.Array,
    weight: Weight,
) -> jax.Array:
    """`grouped` for experts of int8x16, widened for a kernel that takes floats.

    Rows of float32 are rounded, as this form does.
    """
    if x.dtype == jnp.float32:
        return grouped(x, sizes, weight)
    return of_floats(x, sizes, Weight(weight.widened(x.dtype), None))


def arranged(weight: Weight, inputs: int = 1) -> Weight:
    """A weight as these forms read it best: as it is."""
    del inputs
    return weight


def _grouped_of_floats(x: jax.Array, sizes: jax.Array, weight: Weight) -> jax.Array:
    """The product of rows [M I] with experts [E O I] in groups, widened to their dtype."""
    wide = jnp.float32
    if not weight.is_int4:
        matrices = weight.widened(x.dtype)
        y = jax.lax.ragged_dot_general(x, matrices, sizes, _GROUPED, preferred_element_type=wide)
        return y.astype(x.dtype)
    parts = [
        jax.lax.ragged_dot_general(
            x[:, turn::2], half, sizes, _GROUPED, preferred_element_type=wide
        )
        for turn, half in enumerate(weight.halves(x.dtype))
    ]
    return (parts[0] + parts[1]).astype(x.dtype)


@jax.custom_vjp
def _grouped_in_groups(x: jax.Array, sizes: jax.Array, weight: Weight) -> jax.Array:
    expert = expert_of_row(sizes, x.shape[0])

    def multiply(rows: jax.Array, values: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot_general(
            rows, values, sizes, _GROUPED, preferred_element_type=jnp.int32
        )

    return _sum_of_groups(x, weight, multiply, lambda of_experts: of_experts[expert])


def _grouped_in_groups_forward(
    x: jax.Array, sizes: jax.Array, weight: Weight
) -> tuple[jax.Array, Any]:
    return _grouped_in_groups(x, sizes, weight), (x, sizes, weight)


def grouped_in_groups_backward(
    residuals: tuple[jax.Array, jax.Array, Weight], dy: jax.Array
) -> Any:
    """The gradients of `grouped` with experts in groups: as if rows were floats."""
    x, sizes, weight = residuals
    is_used = jnp.arange(len(x))[:, None] < jnp.sum(sizes)

    def of_floats(x: jax.Array, weight: Weight) -> jax.Array:
        return _grouped_of_floats(x, sizes, weight)

    wide = jnp.where(is_used, dy, jnp.zeros((), dy.dtype))
    dx, d_weight = _floats_backward(of_floats, (x, weight), wide)
    return jnp.where(is_used, dx, jnp.zeros((), dx.dtype)), None, d_weight


_grouped_in_groups.defvjp(_grouped_in_groups_forward, grouped_in_groups_backward)


@jax.custom_vjp
def _grouped_scaled(
    x: jax.Array, sizes: jax.Array, values: jax.Array, scale: jax.Array
) -> jax.Array:
    rows, values, x_scale = _factors(False, x, values)
    total = jax.lax.ragged_dot_general(
        rows, values, sizes, _GROUPED, preferred_element_type=_sums_of(rows)
    )
    factor = scale[expert_of_row(sizes, x.shape[0])]
    factor = factor if x_scale is None else x_scale[:, None] * factor
    return (total.astype(jnp.float32) * factor).astype(x.dtype)


_GroupedResiduals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _grouped_scaled_forward(
    x: jax.Array, sizes: jax.Array, values: jax.Array, scale: jax.Array
) -> tuple[jax.Array, _GroupedResiduals]:
    return _grouped_scaled(x, sizes, values, scale), (x, sizes, values, scale)


def _grouped_scaled_backward(
    residuals: _GroupedResiduals, dy: jax.Array
) -> tuple[jax.Array, None, None, jax.Array]:
    x, sizes, values, scale = residuals
    expert = expert_of_row(sizes, len(x))
    is_used = jnp.arange(len(x))[:, None] < jnp.sum(sizes)
    wide = jnp.where(is_used, dy.astype(jnp.float32), 0)
    scaled = (wide * scale[expert]).astype(dy.dtype)
    dx = jax.lax.ragged_dot_general(scaled, values.astype(dy.dtype), sizes, _GROUPED_BACK)
    # Computed only where somebody asks for it: jit drops what is not used.
    unscaled = _grouped_scaled(x.astype(jnp.float32), sizes, values, jnp.ones_like(scale))
    d_scale = gradient_of_scales(wide, unscaled, sizes)
    return jnp.where(is_used, dx, jnp.zeros((), dx.dtype)), None, None, d_scale


_grouped_scaled.defvjp(_grouped_scaled_forward, _grouped_scaled_backward)


def expert_reads(sizes: Sequence[int], rows: int, weight: jax.ShapeDtypeStruct) -> float:
    """Number of experts' matrices that a product of rows in groups reads: those that have rows.

    Args:
        sizes: of the groups.
        rows: M of them all, with those behind the last group.
        weight: shape and dtype of [E O I].
    """
    del rows, weight
    return float(sum(size > 0 for size in sizes))


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
    ends, row = jnp.cumsum(sizes), jnp.arange(rows)
    # Compared with all at once: a search in steps is a loop of programs.
    expert = jnp.searchsorted(ends, row, side="right", method="compare_all")
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
