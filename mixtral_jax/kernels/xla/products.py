"""Products, norm and SwiGLU in XLA: the meaning of every other maker's."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mixtral_jax.weight import Weight, round_rows

# y[M, out] = x[M, in] @ w[E, out, in]^T, rows of x in E groups: contracts the weight's last axis.
_GROUPED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def linear(x: jax.Array, weights: Sequence[Weight]) -> list[jax.Array]:
    """Products of the same rows with several weights: x [R I], weights [O I] -> one [R O] each."""
    return [product(x, weight) for weight in weights]


def product(x: jax.Array, weight: Weight) -> jax.Array:
    """x [R I] -> [R O] for a weight [O I], in the dtype of x."""
    if weight.scale is None:
        return jnp.einsum("RI,OI->RO", x, weight.values)
    rows, x_scale = round_rows(x)
    # XLA:CPU has no fast path for fewer than eight rows of int8.
    rows = jnp.pad(rows, ((0, max(0, 8 - x.shape[0])), (0, 0)))
    total = jnp.einsum("RI,OI->RO", rows, weight.values, preferred_element_type=jnp.int32)
    total = total[: x.shape[0]].astype(jnp.float32)
    return (total * (x_scale[:, None] * weight.scale[None, :])).astype(x.dtype)


def grouped(x: jax.Array, sizes: jax.Array, weight: Weight) -> jax.Array:
    """Rows in E groups, each against its own expert: x [M I], sizes [E], weight [E O I] -> [M O].

    Rows behind the last group have unspecified values.
    """
    if weight.scale is None:
        return jax.lax.ragged_dot_general(x, weight.values, sizes, _GROUPED)
    rows, x_scale = round_rows(x)
    total = jax.lax.ragged_dot_general(
        rows, weight.values, sizes, _GROUPED, preferred_element_type=jnp.int32
    )
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    scale = weight.scale[jnp.minimum(expert, sizes.shape[0] - 1)]
    return (total.astype(jnp.float32) * (x_scale[:, None] * scale)).astype(x.dtype)


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
