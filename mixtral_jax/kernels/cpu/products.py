"""Products, norm and SwiGLU on CPU, by the kernels of products.cc.

The kernels take and give float32; weights are float32, or int8 with a float32 scale per output.
Other dtypes are computed by the XLA forms: a bfloat16 model on CPU is for trying things out.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.weight import Weight


def linear(x: jax.Array, weights: Sequence[Weight]) -> list[jax.Array]:
    """`xla.linear`: x [R I] f32 -> one [R O] for each weight [O I]; all are of one dtype."""
    if x.dtype != jnp.float32:
        return xla.linear(x, weights)
    rows = x.shape[0]
    shapes = [jax.ShapeDtypeStruct((rows, w.values.shape[0]), jnp.float32) for w in weights]
    arrays = [array for weight in weights for array in weight.arrays]
    return list(jax.ffi.ffi_call("mixtral_jax_linear", shapes)(x, *arrays))


def grouped(x: jax.Array, sizes: jax.Array, weight: Weight) -> jax.Array:
    """`xla.grouped`, which on CPU computes every expert for every row.

    x [M I] f32, sizes [E] -> [M O]. Rows behind the last group give zeros.
    """
    if x.dtype != jnp.float32:
        return xla.grouped(x, sizes, weight)
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.values.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call("mixtral_jax_grouped", shape)
    out: jax.Array = call(x, sizes.astype(jnp.int32), *weight.arrays)
    return out


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`xla.norm` for rows [R D] of float32."""
    if x.dtype != jnp.float32:
        return xla.norm(x, weight, eps)
    call = jax.ffi.ffi_call("mixtral_jax_norm", jax.ShapeDtypeStruct(x.shape, x.dtype))
    out: jax.Array = call(x, weight, eps=np.float32(eps))
    return out


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`xla.swiglu` for [R F] each, to which XLA:CPU gives one thread: a twelfth of a prompt."""
    if up.dtype != jnp.float32:
        return xla.swiglu(gate, up)
    call = jax.ffi.ffi_call("mixtral_jax_swiglu", jax.ShapeDtypeStruct(up.shape, up.dtype))
    out: jax.Array = call(gate, up)
    return out
