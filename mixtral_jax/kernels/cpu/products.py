"""Products, norm and SwiGLU on CPU, by the kernels of products.cc; gradients by gradients.cc.

The kernels take and give float32; weights are float32, int8 with a float32 scale per output, or
int4 or int8 with scales of groups (weight.py), in tiles: those that are not are turned into them
first, which `arranged` does once and for all.
Other dtypes are computed by the XLA forms: a bfloat16 or fp8 model on CPU is for trying things out.

Gradients are those of the XLA forms: with int8 they pass straight through the rounding. Slopes are
not rounded, but for `linear` of many rows by int8 in forms that multiply bytes: to 15 bits and
a sign, in steps of 1/16256 of the largest one of a row. What nobody asks for, such as the gradient
of a weight that stays as it is, is dropped by jit.
"""

from collections.abc import Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.kernels.cpu import build
from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.weight import Weight

_MANY_ROWS = 24  # fewer are not worth a copy of the weight in another order
# The slopes of a vocabulary are a large one and very many small ones, which steps of 1/16256 would
# round to nought, though they have a sum.
_MOST_OUTPUTS = 16384


def linear(x: jax.Array, weights: Sequence[Weight]) -> list[jax.Array]:
    """`xla.linear`: x [R I] f32 -> one [R O] for each weight [O I]; a call for each dtype."""
    weights = [arranged(weight) for weight in weights]
    if x.dtype != jnp.float32 or not all(map(_takes, weights)):
        return xla.linear(x, weights)
    dtypes = [tuple(array.dtype for array in weight.arrays) for weight in weights]
    products: dict[int, jax.Array] = {}
    for dtype in dict.fromkeys(dtypes):
        own = [i for i, other in enumerate(dtypes) if other == dtype]
        products |= dict(zip(own, _linear(x, [weights[i] for i in own]), strict=True))
    return [products[i] for i in range(len(weights))]


def arranged(weight: Weight, inputs: int = 1) -> Weight:
    """`Kernels.arranged`: weights in groups stand in tiles."""
    return weight.in_tiles(inputs)


def _takes(weight: Weight) -> bool:
    """Says whether the kernels take a weight, which is arranged."""
    return weight.is_in_tiles if weight.is_in_groups else not weight.is_fp8


@jax.custom_vjp
def _linear(x: jax.Array, weights: list[Weight]) -> list[jax.Array]:
    rows = x.shape[0]
    shapes = [jax.ShapeDtypeStruct((rows, w.values.shape[0]), jnp.float32) for w in weights]
    arrays = [array for weight in weights for array in weight.arrays]
    return list(jax.ffi.ffi_call("mixtral_jax_linear", shapes)(x, *arrays))


_Linear = tuple[jax.Array, list[Weight]]


def _linear_forward(x: jax.Array, weights: list[Weight]) -> tuple[list[jax.Array], _Linear]:
    return _linear(x, weights), (x, weights)


def _linear_backward(residuals: _Linear, slopes: list[jax.Array]) -> _Linear:
    x, weights = residuals
    if any(weight.is_in_groups for weight in weights):
        backs = [
            xla.product_in_groups_backward((x, weight), dy)
            for weight, dy in zip(weights, slopes, strict=True)
        ]
        return reduce(jnp.add, [dx for dx, _ in backs]), [d_weight for _, d_weight in backs]
    if all(_goes_by_bytes(x, weight) for weight in weights):
        pairs = list(zip(weights, slopes, strict=True))
        back = partial(jax.ffi.ffi_call, "mixtral_jax_linear_back")
        rows = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        parts: list[jax.Array] = [back(rows)(dy, *w.arrays) for w, dy in pairs]
        return reduce(jnp.add, parts), [_gradient_of_scale(x, w, dy) for w, dy in pairs]
    # XLA's products of many rows of floats are as fast as a kernel of ours.
    gradients: _Linear = jax.vjp(xla.linear, *residuals)[1](slopes)
    return gradients


def _goes_by_bytes(x: jax.Array, weight: Weight) -> bool:
    """Says whether `linear_back` computes the slopes of rows [R I] beside a weight [O I]."""
    fits = x.shape[0] >= _MANY_ROWS and weight.values.shape[0] <= _MOST_OUTPUTS
    return fits and weight.scale is not None and build.multiplies_bytes()


def _gradient_of_scale(x: jax.Array, weight: Weight, slope: jax.Array) -> Weight:
    assert weight.scale is not None
    (unscaled,) = _linear(x, [Weight(weight.values, jnp.ones_like(weight.scale))])
    return Weight(xla.no_gradient(weight.values), jnp.sum(slope * unscaled, axis=0))


_linear.defvjp(_linear_forward, _linear_backward)


def grouped(x: jax.Array, sizes: jax.Array, weight: Weight) -> jax.Array:
    """`xla.grouped`, which on CPU computes every expert for every row.

    x [M I] f32, sizes [E] -> [M O]. Rows behind the last group give zeros.
    """
    weight = arranged(weight)
    if x.dtype != jnp.float32 or not _takes(weight):
        return xla.grouped(x, sizes, weight)
    return _grouped(x, sizes.astype(jnp.int32), weight)


@jax.custom_vjp
def _grouped(x: jax.Array, sizes: jax.Array, weight: Weight) -> jax.Array:
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.values.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call("mixtral_jax_grouped", shape)
    out: jax.Array = call(x, sizes, *weight.arrays)
    return out


_Grouped = tuple[jax.Array, jax.Array, Weight]


def _grouped_forward(x: jax.Array, sizes: jax.Array, weight: Weight) -> tuple[jax.Array, _Grouped]:
    return _grouped(x, sizes, weight), (x, sizes, weight)


def _grouped_backward(residuals: _Grouped, slope: jax.Array) -> tuple[jax.Array, None, Weight]:
    x, sizes, weight = residuals
    if weight.is_in_groups:
        by_floats: tuple[jax.Array, None, Weight]
        by_floats = xla.grouped_in_groups_backward(residuals, slope)
        return by_floats
    rows = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    dx: jax.Array = jax.ffi.ffi_call("mixtral_jax_grouped_back", rows)(slope, sizes, *weight.arrays)
    if weight.scale is not None:
        unscaled = _grouped(x, sizes, Weight(weight.values, jnp.ones_like(weight.scale)))
        d_scale = xla.gradient_of_scales(slope, unscaled, sizes)
        return dx, None, Weight(xla.no_gradient(weight.values), d_scale)
    values = jax.ShapeDtypeStruct(weight.values.shape, jnp.float32)
    dw: jax.Array = jax.ffi.ffi_call("mixtral_jax_grouped_weight", values)(slope, x, sizes)
    return dx, None, Weight(dw, None)


_grouped.defvjp(_grouped_forward, _grouped_backward)


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`xla.norm` for rows [R D] of float32."""
    if x.dtype != jnp.float32:
        return xla.norm(x, weight, eps)
    return _norm(eps, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(eps: float, x: jax.Array, weight: jax.Array) -> jax.Array:
    call = jax.ffi.ffi_call("mixtral_jax_norm", jax.ShapeDtypeStruct(x.shape, x.dtype))
    out: jax.Array = call(x, weight, eps=np.float32(eps))
    return out


_Pair = tuple[jax.Array, jax.Array]


def _norm_forward(eps: float, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, _Pair]:
    return _norm(eps, x, weight), (x, weight)


def _norm_backward(eps: float, residuals: _Pair, slope: jax.Array) -> _Pair:
    gradients: _Pair = jax.vjp(partial(xla.norm, eps=eps), *residuals)[1](slope)
    return gradients


_norm.defvjp(_norm_forward, _norm_backward)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`xla.swiglu` for [*R F] each, to which XLA:CPU gives one thread: a twelfth of a prompt."""
    if up.dtype != jnp.float32:
        return xla.swiglu(gate, up)
    return _swiglu(gate, up)


@jax.custom_vjp
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    call = jax.ffi.ffi_call("mixtral_jax_swiglu", jax.ShapeDtypeStruct(up.shape, up.dtype))
    out: jax.Array = call(gate, up)
    return out


def _swiglu_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, _Pair]:
    return _swiglu(gate, up), (gate, up)


def _swiglu_backward(residuals: _Pair, slope: jax.Array) -> _Pair:
    shape = jax.ShapeDtypeStruct(slope.shape, slope.dtype)
    call = jax.ffi.ffi_call("mixtral_jax_swiglu_back", (shape, shape))
    d_gate, d_up = call(*residuals, slope)
    return d_gate, d_up


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
