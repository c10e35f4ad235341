"""A weight and its scales, and the rounding to int8: the only file that rounds.

With dtype int8 (W8A8) a weight holds int8 values and one float32 scale for each output. The rows
that meet it are rounded to int8 when they arrive, with one scale for each row, so the product is
exact in int32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

# The smallest normal float32. A smaller bound would be flushed to zero on some devices.
_TINY = float(jnp.finfo(jnp.float32).tiny)


class Weight(NamedTuple):
    """A weight for products over its last axis: values [*O I] and, for int8, scales [*O] f32.

    A float weight has no scale. An int8 weight stands for `values * scale`.
    """

    values: jax.Array
    scale: jax.Array | None

    @classmethod
    def quantized(cls, weight: Float[Array, "*O I"]) -> "Weight":
        """Rounds a float weight to int8, symmetrically: the largest value of an output is 127."""
        return cls(*round_rows(weight))

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """The arrays that are there: one for a float weight, two for int8."""
        return (self.values,) if self.scale is None else (self.values, self.scale)


def round_rows(x: Float[Array, "*R I"]) -> tuple[Int8[Array, "*R I"], Float32[Array, "*R"]]:
    """Rounds each row to int8 with a scale of its own: x = values * scale, up to rounding.

    A row of zeros has the scale 0.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    inverse = jnp.where(scale > 0, 1 / jnp.maximum(scale, _TINY), 0)
    return jnp.round(wide * inverse[..., None]).astype(jnp.int8), scale
