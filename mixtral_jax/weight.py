"""A weight and its scales, and the rounding to int8, int4 and fp8: the only file that rounds.

With dtype int8 (W8A8) a weight holds int8 values and one float32 scale for each output. The rows
that meet it are rounded to int8 when they arrive, with one scale for each row, so the product is
exact in int32.

With dtype fp8 the values are float8_e4m3fn (arXiv:2209.05433: four bits of exponent, three of
fraction, 448 the largest), with the same scales. The rows are rounded to it too (W8A8) on devices
that multiply fp8; elsewhere the values are widened to the dtype of the rows (W8A16).

With dtype int4 groups of 32 inputs have a scale and a minimum of their own: a weight is
`q * scale + minimum` with q in 0 .. 15. Two inputs stand in a byte, the even one in its low bits.
Rows of float32 that meet it are rounded to int8 with a scale for each group (W4A8); those of
bfloat16 meet the widened weight (W4A16).

    values   uint8    [*O I/2]
    scale    float16  [*O I/32 2]  the group's scale and its minimum

Single weights of an int8 or int4 model may have the dtype int8x16: int8 in groups of 16 inputs,
each with a scale. Rows of float32 that meet it are rounded to int8 with a scale for each group
(W8A8); those of bfloat16 meet the widened weight (W8A16).

    values   int8     [*O I]
    scale    float16  [*O I/16]

The kernels for CPU read weights in groups in tiles of 16 outputs: a word of four bytes of each of
them follows a word of each, and so do their scales. The shapes are as if nothing had moved, but for
the last axis of values, which counts words. The dtype of values says that they are words. Models
take this order when a step is made of them (model/arrangement.py); checkpoints have the other.

    values   uint32 or int32   [*O I/8] or [*O I/4]     in memory [*O/16 I/8 16] or [*O/16 I/4 16]
    scale    float16           [*O I/32 2] or [*O I/16]           [*O/16 I/32 2 16], [*O/16 I/16 16]
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float8e4m3fn, Float16, Float32, Int8, UInt8

from mixtral_jax.errors import ConfigError

# The dtypes of values with scales, by the name of a model's dtype.
QUANTIZED: Mapping[str, jnp.dtype] = MappingProxyType(
    {
        "int8": jnp.dtype(jnp.int8),
        "int4": jnp.dtype(jnp.uint8),
        "fp8": jnp.dtype(jnp.float8_e4m3fn),
    }
)
GROUP_SIZE = 32  # inputs of int4 that share a scale and a minimum
INT8_GROUPS = "int8x16"  # int8 in groups
INT8_GROUP_SIZE = 16  # inputs that share a scale there
# The dtypes of weights in groups, with the inputs of a group.
GROUPS: Mapping[str, int] = MappingProxyType({"int4": GROUP_SIZE, INT8_GROUPS: INT8_GROUP_SIZE})
TILE = 16  # outputs of a tile
# The dtypes of words, by that of the bytes in them.
_WORDS = {jnp.dtype(jnp.uint8): jnp.dtype(jnp.uint32), jnp.dtype(jnp.int8): jnp.dtype(jnp.int32)}
INT4_DTYPES = frozenset({QUANTIZED["int4"], _WORDS[QUANTIZED["int4"]]})  # of values of int4
# The smallest normal float32. A smaller bound would be flushed to zero on some devices.
_TINY = float(jnp.finfo(jnp.float32).tiny)
_LARGEST_FP8 = float(jnp.finfo(jnp.float8_e4m3fn).max)


class Weight(NamedTuple):
    """A weight for products over its last axis: values [*O I] and, if rounded, scales [*O] f32.

    A float weight has no scale. One of int8 or fp8 stands for `values * scale`; one of int4 or
    int8x16 is as this module says.
    """

    values: jax.Array
    scale: jax.Array | None

    @classmethod
    def quantized(cls, weight: Float[Array, "*O I"], dtype: str = "int8") -> "Weight":
        """Rounds a float weight to int8 or fp8, so that the largest value of an output is kept.

        Or to int8x16, likewise by groups; or to int4, each group by the grid that rounds it best.
        """
        if dtype == INT8_GROUPS:
            return cls(*_round_groups(weight))
        if dtype == "int4":
            grid = Grid.of(weight)
            return cls(packed(grid.levels(weight)), grid.pairs)
        return cls(*(round_rows(weight) if dtype == "int8" else round_rows_fp8(weight)))

    @property
    def is_fp8(self) -> bool:
        """Says whether the values are fp8."""
        return self.values.dtype == QUANTIZED["fp8"]

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """The arrays that are there: one for a float weight, two for a rounded one."""
        return (self.values,) if self.scale is None else (self.values, self.scale)

    @property
    def is_int4(self) -> bool:
        """Says whether two values stand in a byte."""
        return self.values.dtype in INT4_DTYPES

    @property
    def is_in_groups(self) -> bool:
        """Says whether groups of inputs have scales of their own: int4 and int8x16."""
        return self.is_int4 or self.is_int8_groups

    @property
    def is_int8_groups(self) -> bool:
        """Says whether the values are int8 in groups."""
        has_groups = self.scale is not None and self.scale.dtype == jnp.float16
        return has_groups and not self.is_int4

    @property
    def is_in_tiles(self) -> bool:
        """Says whether a weight in groups stands in tiles."""
        return self.values.dtype in _WORDS.values()

    def in_tiles(self, inputs: int = 1) -> "Weight":
        """A weight in groups in tiles, if its outputs are whole ones, and any other as it is.

        Args:
            inputs: the number of the last axes of values that are inputs; tiles do not cross
                outputs before the last axis of them.
        """
        outputs = self.values.shape[: self.values.ndim - inputs]
        if not self.is_in_groups or self.is_in_tiles or outputs[-1] % TILE:
            return self
        assert self.scale is not None
        words = self.values.reshape(*self.values.shape[:-1], -1, 4)
        words = jax.lax.bitcast_convert_type(words, _WORDS[self.values.dtype])
        tiles = math.prod(outputs) // TILE

        def turned(array: jax.Array) -> jax.Array:
            return array.reshape(tiles, TILE, -1).swapaxes(1, 2).reshape(array.shape)

        return Weight(turned(words), turned(self.scale))

    def in_rows(self, inputs: int = 1) -> "Weight":
        """A weight in tiles as it is elsewhere, and any other as it is: undoes `in_tiles`."""
        if not self.is_in_tiles:
            return self
        assert self.scale is not None

        def turned(array: jax.Array) -> jax.Array:
            tiles = math.prod(self.values.shape[: self.values.ndim - inputs]) // TILE
            return array.reshape(tiles, -1, TILE).swapaxes(1, 2).reshape(array.shape)

        words = turned(self.values)
        values = jax.lax.bitcast_convert_type(words, jnp.uint8 if self.is_int4 else jnp.int8)
        return Weight(values.reshape(*words.shape[:-1], -1), turned(self.scale))

    def widened(self, dtype: DTypeLike) -> Float[Array, "*O I"]:
        """A weight in groups as floats: computed in float32, and rounded to `dtype`."""
        values, scale = self.in_rows()
        assert scale is not None
        if self.is_int8_groups:
            groups = values.reshape(*scale.shape, INT8_GROUP_SIZE).astype(jnp.float32)
            wide = groups * scale[..., None].astype(jnp.float32)
            return wide.astype(dtype).reshape(values.shape)
        return Grid(scale).values(unpacked(values)).astype(dtype)

    def halves(self, dtype: DTypeLike) -> tuple[Float[Array, "*O _"], Float[Array, "*O _"]]:
        """The columns of an int4 weight for even and for odd inputs, as `widened` has them.

        Nothing is interleaved, so a compiler may widen them where they are multiplied.
        """
        values, pairs = self.in_rows()
        assert pairs is not None
        bytes_of_group = GROUP_SIZE // 2
        groups = values.reshape(*values.shape[:-1], -1, bytes_of_group)
        scale, minimum = (pairs[..., i, None].astype(jnp.float32) for i in range(2))

        def wide(levels: jax.Array) -> jax.Array:
            columns = levels.astype(jnp.float32) * scale + minimum
            return columns.astype(dtype).reshape(values.shape)

        return wide(groups & jnp.uint8(15)), wide(groups >> jnp.uint8(4))


class Grid(NamedTuple):
    """The values that weights [*O I] of int4 may have: scale and minimum of each group."""

    pairs: Float16[Array, "*O G 2"]

    @classmethod
    def of(
        cls, weight: Float[Array, "*O I"], importance: Float[Array, " I"] | None = None
    ) -> "Grid":
        """The grid of each group of inputs: of some widths around its middle, the one that rounds
        it best.

        Args:
            weight: finite, at most 65,504 in size.
            importance: of each input, by which squared errors are weighed; None for all the same.

        Raises ConfigError for inputs that are no whole number of groups.
        """
        inputs = weight.shape[-1]
        if inputs % GROUP_SIZE:
            raise ConfigError(
                f"int4 rounds groups of {GROUP_SIZE} inputs, and a weight has {inputs}, which is "
                "no multiple; use --dtype int8"
            )
        groups = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, GROUP_SIZE)
        costs = jnp.ones(inputs, jnp.float32) if importance is None else importance
        costs = costs.reshape((1,) * (groups.ndim - 2) + (-1, GROUP_SIZE))
        low, high = jnp.min(groups, axis=-1), jnp.max(groups, axis=-1)
        middle, half = (low + high) / 2, (high - low) / 2

        def of_width(share: jax.Array) -> tuple[jax.Array, jax.Array]:
            pairs = jnp.stack([half * share / 7.5, middle - half * share], axis=-1)
            pairs = pairs.astype(jnp.float16)
            scale, minimum = (pairs[..., i, None].astype(jnp.float32) for i in range(2))
            change = groups - (nearest_level(groups, scale, minimum) * scale + minimum)
            return jnp.sum(costs * change * change, axis=-1), pairs

        def better(
            best: tuple[jax.Array, jax.Array], share: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            cost, pairs = of_width(share)
            is_better = cost < best[0]
            kept = jnp.where(is_better[..., None], pairs, best[1])
            return (jnp.where(is_better, cost, best[0]), kept), None

        shares = jnp.asarray(_WIDTHS, jnp.float32)
        (_, pairs), _ = jax.lax.scan(better, of_width(shares[0]), shares[1:])
        return cls(pairs)

    def levels(self, weight: Float[Array, "*O I"]) -> UInt8[Array, "*O I"]:
        """The numbers 0 .. 15 of the values that are nearest to those of a weight."""
        return nearest_level(weight.astype(jnp.float32), *self.by_input).astype(jnp.uint8)

    def values(self, levels: UInt8[Array, "*O I"]) -> Float32[Array, "*O I"]:
        """The values that have these numbers."""
        scale, minimum = self.by_input
        return levels.astype(jnp.float32) * scale + minimum

    @property
    def by_input(self) -> tuple[jax.Array, jax.Array]:
        """Scale and minimum of each weight: f32 [*O I]."""
        scale, minimum = (
            jnp.repeat(self.pairs[..., i].astype(jnp.float32), GROUP_SIZE, axis=-1)
            for i in range(2)
        )
        return scale, minimum


# Shares of a group's width that a grid may have: a few weights beyond its ends cost less than steps
# that are wider for all of them.
_WIDTHS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def nearest_level(values: jax.Array, scale: jax.Array, minimum: jax.Array) -> jax.Array:
    """The number 0 .. 15 of a grid's value that is nearest, as float32, for arrays of float32."""
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    return jnp.clip(jnp.round((values - minimum) * inverse), 0, 15)


def packed(levels: UInt8[Array, "*O I"]) -> UInt8[Array, "*O _"]:
    """Two numbers 0 .. 15 in each byte, that of the even input in its low bits."""
    return levels[..., 0::2] | levels[..., 1::2] << jnp.uint8(4)


def unpacked(values: UInt8[Array, "*O _"]) -> UInt8[Array, "*O I"]:
    """The numbers 0 .. 15 of which there are two in each byte."""
    pairs = jnp.stack([values & jnp.uint8(15), values >> jnp.uint8(4)], axis=-1)
    return pairs.reshape(*values.shape[:-1], -1)


def is_quantized(dtype: str) -> bool:
    """Says whether weights of a model's dtype have scales: int8, int4 and fp8."""
    return dtype in QUANTIZED


def round_rows(x: Float[Array, "*R I"]) -> tuple[Int8[Array, "*R I"], Float32[Array, "*R"]]:
    """Rounds each row to int8 with a scale of its own: x = values * scale, up to rounding.

    A row of zeros has the scale 0.
    """
    rows, scale = _scaled(x, 127.0)
    return jnp.round(rows).astype(jnp.int8), scale


def _round_groups(
    weight: Float[Array, "*O I"],
) -> tuple[Int8[Array, "*O I"], Float16[Array, "*O G"]]:
    """Rounds each 16 inputs to int8 with a scale of their own, of float16."""
    groups = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, INT8_GROUP_SIZE)
    scale = (jnp.max(jnp.abs(groups), axis=-1) / 127).astype(jnp.float16)
    wide = scale.astype(jnp.float32)
    inverse = jnp.where(wide > 0, 1 / jnp.where(wide > 0, wide, 1), 0)
    values = jnp.clip(jnp.round(groups * inverse[..., None]), -127, 127).astype(jnp.int8)
    return values.reshape(weight.shape), scale


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
