"""Products of low-rank adapters on CPU, by the kernel of low_rank.cc; float32 only."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mixtral_jax.kernels.no_gradient import without_gradient
from mixtral_jax.kernels.xla import low_rank as xla


def add_low_rank(
    ys: Sequence[jax.Array],
    x: jax.Array,
    groups: jax.Array,
    lows: Sequence[tuple[jax.Array, jax.Array]],
) -> list[jax.Array]:
    """`xla.add_low_rank`; rows without a group are not read, nor written."""
    if any(array.dtype != jnp.float32 for array in (x, *ys)):
        return xla.add_low_rank(ys, x, groups, lows)
    x = without_gradient("adapters of single rows (add_low_rank)", x)
    shapes = [jax.ShapeDtypeStruct(y.shape, jnp.float32) for y in ys]
    places = {2 + 3 * i: i for i in range(len(shapes))}
    call = jax.ffi.ffi_call("mixtral_jax_add_low_rank", shapes, input_output_aliases=places)
    arrays = [array for y, low in zip(ys, lows, strict=True) for array in (y, *low)]
    return list(call(x, groups.astype(jnp.int32), *arrays))
