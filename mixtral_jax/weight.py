"""A weight and its scales, and the rounding to int8 and fp8: the only file that rounds.

With dtype int8 (W8A8) a weight holds int8 values and one float32 scale for each output. The rows
that meet it are rounded to int8 when they arrive, with one scale for each row, so the product is
exact in int32.

With dtype fp8 the values are float8_e4m3fn (arXiv:2209.05433: four bits of exponent, three of
fraction, 448 the largest), with the same scales. The rows are rounded to it too (W8A8) on devices
that multiply fp8; elsewhere the values are widened to the dtype of the rows (W8A16).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int8

# The dtypes of values with scales, by the name of a model's dtype.
QUANTIZED: Mapping[str, jnp.dtype] = MappingProxyType(
    {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
)
# The smallest normal float32. A smaller bound would be flushed to zero on some devices.
_TINY = float(jnp.finfo(jnp.float32).tiny)
_LARGEST_FP8 = float(jnp.finfo(jnp.float8_e4m3fn).max)


class Weight(NamedTuple):
    """A weight for products over its last axis: values [*O I] and, if rounded, scales [*O] f32.

    A float weight has no scale. One of int8 or fp8 stands for `values * scale`.
    """

    values: jax.Array
    scale: jax.Array | None

    @classmethod
    def quantized(cls, weight: Float[Array, "*O I"], dtype: str = "int8") -> "Weight":
        """Rounds a float weight to int8 or fp8, so that the largest value of an output is kept."""
        return cls(*(round_rows(weight) if dtype == "int8" else round_rows_fp8(weight)))

    @property
    def is_fp8(self) -> bool:
        """Says whether the values are fp8."""
        return self.values.dtype == QUANTIZED["fp8"]

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """The arrays that are there: one for a float weight, two for int8 and fp8."""
        return (self.values,) if self.scale is None else (self.values, self.scale)


def is_quantized(dtype: str) -> bool:
    """Says whether weights of a model's dtype have scales: int8 and fp8."""
    return dtype in QUANTIZED


def round_rows(x: Float[Array, "*R I"]) -> tuple[Int8[Array, "*R I"], Float32[Array, "*R"]]:
    """Rounds each row to int8 with a scale of its own: x = values * scale, up to rounding.

    A row of zeros has the scale 0.
    """
    rows, scale = _scaled(x, 127.0)
    return jnp.round(rows).astype(jnp.int8), scale


def round_rows_fp8(
    x: Float[Array, "*R I"],
) -> tuple[Float8e4m3fn[Array, "*R I"], Float32[Array, "*R"]]:
    """Rounds each row to float8_e4m3fn likewise: its largest value becomes 448."""
    rows, scale = _scaled(x, _LARGEST_FP8)
    return rows.astype(jnp.float8_e4m3fn), scale


def _scaled(x: jax.Array, largest: float) -> tuple[jax.Array, jax.Array]:
    """Rows in float32 whose largest value is `largest`, and the scales [*R] that undo it."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / largest
    inverse = jnp.where(scale > 0, 1 / jnp.maximum(scale, _TINY), 0)
    return wide * inverse[..., None], scale


def round_by(x: Float[Array, "*R I"], scale: Float32[Array, "*R"]) -> Int8[Array, "*R I"]:
    """Rounds each row to int8 by a scale that is given: x = values * scale, up to rounding.

    Scales are above 0; what exceeds 127 of them becomes 127 of them.
    """
    values = jnp.round(x.astype(jnp.float32) / scale[..., None])
    return jnp.clip(values, -127, 127).astype(jnp.int8)
