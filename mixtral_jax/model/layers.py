"""The small layers: RMSNorm, rotary embedding, Linear, Embedding, FeedForward.

Weights keep the `[out, in]` order that Hugging Face stores, so a converter copies bytes, and
matrix products contract the weight's last axes, which is the fast order on CPU. With dtype int8 or
fp8 everything between the products, and small weights (norms, routers), stays in the placement's
activation dtype; with fp8 the embedding and the head as well.

Every layer has two forms: `full` (differentiable) for whole sequences, and `paged` (serving); both
by the placement's kernels. Under a mesh the full form sees whole arrays, and the compiler splits
them; the paged form runs on one device's parts of them, and sums up by `Layout`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mixtral_jax.axes import FlatHidden, FlatTokens, Hidden, Positions, Scalar
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.kernels import Kernels
from mixtral_jax.kernels.xla import products as xla
from mixtral_jax.model.adapter import UNCHANGED, BlockAdapter, LowRank
from mixtral_jax.model.adapter_stack import NO_ADAPTERS, Adapters, Stack, add_stacks
from mixtral_jax.model.capture import NOTHING, Capture
from mixtral_jax.placement import Placement, checked_dtype
from mixtral_jax.weight import GROUPS, INT8_GROUPS, QUANTIZED, Weight, is_quantized


def parameter(axes: str, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs | None) -> nnx.Param:
    """Random weight whose dimensions are the letters of `axes`; the tag decides its sharding.

    Normal with standard deviation 0.02, as Hugging Face's `initializer_range`. Without `rngs`, a
    ShapeDtypeStruct: tracing the initialisation of a whole model would take seconds.
    """
    shape = tuple(config.axis_sizes[letter] for letter in axes)
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes)
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype), axes=axes)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, normalised in float32 (arXiv:1910.07467)."""

    def __init__(self, config: ModelConfig, placement: Placement, rngs: nnx.Rngs | None) -> None:
        self.weight = parameter("D", config, placement.activation_dtype, rngs)
        if rngs is not None:
            self.weight.set_value(jnp.ones(config.hidden_size, placement.activation_dtype))
        self.eps = config.norm_eps
        self.kernels = placement.kernels

    def full(self, x: Hidden) -> Hidden:
        """Normalises the last axis of x [*R D]."""
        with jax.named_scope("norm"):
            return xla.norm(x, self.weight[...], self.eps)

    def paged(self, x: FlatHidden) -> FlatHidden:
        """Normalises rows [T D] by the placement's kernel."""
        with jax.named_scope("norm"):
            return self.kernels.norm(x, self.weight[...], self.eps)


class Rotary(NamedTuple):
    """Rotation of each position (arXiv:2104.09864), half-split as in Hugging Face.

    `cos` and `sin` are f32 [*R 1 H/2]: the 1 stands for the heads.
    """

    cos: jax.Array
    sin: jax.Array

    @classmethod
    def at(cls, positions: Positions, config: ModelConfig) -> "Rotary":
        """Makes the rotation of positions [*R], in float32."""
        half = config.head_size // 2
        with jax.named_scope("rope"):
            frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
            angle = positions[..., None, None].astype(jnp.float32) * frequency.reshape(
                (1,) * (positions.ndim + 1) + (-1,)
            )
            return cls(jnp.cos(angle), jnp.sin(angle))

    def rotate(self, x: jax.Array) -> jax.Array:
        """Rotates heads [*R N H] or [*R K H]; computed in f32, returned in the dtype of x."""
        with jax.named_scope("rope"):
            first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
            turned = (
                first * self.cos - second * self.sin,
                second * self.cos + first * self.sin,
            )
            return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Linear(nnx.Module):
    """y = x @ weight^T for a weight whose letters are `outputs` + `inputs`; no bias."""

    def __init__(
        self,
        outputs: str,
        inputs: str,
        config: ModelConfig,
        placement: Placement,
        rngs: nnx.Rngs | None,
        dtype: DTypeLike,
    ) -> None:
        self.weight, self.scale = weight_parameters(outputs, inputs, config, dtype, rngs)
        self.num_inputs = len(inputs)
        self.kernels, self.full_kernels = placement.kernels, placement.full_kernels

    def full(self, x: jax.Array, low: LowRank | None = None) -> jax.Array:
        """x [*R inputs] -> [*R outputs], with what an adapter adds."""
        rows = x.shape[: x.ndim - self.num_inputs]
        # One axis in and one out: on CPU two contracted axes take a path that is twice as slow.
        flat = x.reshape(math.prod(rows), -1)
        y = full_product(flat, self.flat_weight, self.full_kernels)
        return self._shaped(y if low is None else y + low.product(flat), rows)

    def paged(
        self, x: jax.Array, stack: Stack | None = None, slots: FlatTokens | None = None
    ) -> jax.Array:
        """x [T inputs] -> [T outputs], by the placement's kernel, with what adapters add."""
        return paged_together(x, self, stacks=(stack,), slots=slots)[0]

    @property
    def flat_weight(self) -> Weight:
        """The weight as [O I]: its axes on either side made one."""
        outputs = math.prod(self.weight.shape[: -self.num_inputs])
        values, scale = weight_of(self.weight, self.scale)
        rows = Weight(values.reshape(outputs, -1), scale)
        if scale is None:
            return rows
        of_groups = (-1, 2) if rows.is_int4 else (-1,) if rows.is_int8_groups else ()
        return rows._replace(scale=scale.reshape(outputs, *of_groups))

    def _shaped(self, y: jax.Array, rows: tuple[int, ...]) -> jax.Array:
        return y.reshape(*rows, *self.weight.shape[: -self.num_inputs])


def full_product(x: jax.Array, weight: Weight, kernels: Kernels) -> jax.Array:
    """x [R I] -> [R O] of the full forms, for a weight [O I].

    Floats go by XLA, whose products of many rows are the fastest on every device; a kernel for CPU
    would keep a row's bits whatever runs beside it, for which only serving asks.
    """
    if weight.scale is None:
        return xla.product(x, weight)
    return kernels.linear(x, [weight])[0]


def paged_together(
    x: jax.Array,
    *linears: Linear,
    stacks: Sequence[Stack | None] = (),
    slots: FlatTokens | None = None,
) -> list[jax.Array]:
    """The paged form of several layers for the same rows: x [T inputs] -> [T outputs] of each.

    Where rows have adapters, `stacks` has those beside each layer and `slots` [T] each row's slot.
    """
    weights = [linear.flat_weight for linear in linears]
    kernels, flat = linears[0].kernels, x.reshape(x.shape[0], -1)
    products = kernels.linear(flat, weights)
    if slots is not None:
        products = add_stacks(products, flat, slots, stacks, kernels)
    return [linear._shaped(y, x.shape[:1]) for linear, y in zip(linears, products, strict=True)]


def weight_parameters(
    outputs: str, inputs: str, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs | None
) -> tuple[nnx.Param, nnx.Param | None]:
    """Makes a weight and, if it is rounded, what weight.py says of its scales.

    Raises ConfigError where the last axis of inputs in groups is no whole number of them, for the
    letter of that axis splits groups and bytes as well.
    """
    name = INT8_GROUPS if dtype == INT8_GROUPS else checked_dtype(dtype)
    if name != INT8_GROUPS and not is_quantized(name):
        return parameter(outputs + inputs, config, dtype, rngs), None
    weight = parameter(outputs + inputs, config, jnp.float32, rngs)
    shape, scale = weight.shape, parameter(outputs, config, jnp.float32, None)
    if name in GROUPS:
        *leading, size = shape
        if size % GROUPS[name]:
            raise ConfigError(
                f"{name} rounds groups of {GROUPS[name]} inputs, and this model has weights with "
                f"{size} along their last axis, which is no multiple; use int8"
            )
        of_groups, letters = (*leading, size // GROUPS[name]), outputs + inputs
        if name == "int4":
            shape, of_groups, letters = (*leading, size // 2), (*of_groups, 2), f"{letters}Z"
        scale = nnx.Param(jax.ShapeDtypeStruct(of_groups, jnp.float16), axes=letters)
    if rngs is None:
        stored = QUANTIZED["int8" if name == INT8_GROUPS else name]
        weight.set_value(jax.ShapeDtypeStruct(shape, stored))
        return weight, scale
    rounded = Weight.quantized(weight[...].reshape(*weight.shape[: len(outputs)], -1), name)
    assert rounded.scale is not None
    weight.set_value(rounded.values.reshape(shape))
    scale.set_value(rounded.scale.reshape(scale.shape))
    return weight, scale


def weight_of(weight: nnx.Param, scale: nnx.Param | None) -> Weight:
    """The arrays of what `weight_parameters` made."""
    return Weight(weight[...], None if scale is None else scale[...])


class Embedding(nnx.Module):
    """Rows of a table for tokens, and, where embeddings are tied, the head that scores them."""

    def __init__(self, config: ModelConfig, placement: Placement, rngs: nnx.Rngs | None) -> None:
        self.weight, self.scale = weight_parameters("V", "D", config, placement.table_dtype, rngs)
        self.layout = placement.layout

    def full(self, tokens: jax.Array) -> Hidden:
        """tokens [*R] -> [*R D]; float32 where the table is int8."""
        rows = self.weight[...][tokens]
        if self.scale is None:
            return rows
        return rows.astype(jnp.float32) * self.scale[...][tokens][..., None]

    def paged(self, tokens: jax.Array) -> FlatHidden:
        """tokens [T] -> [T D]; each device looks up what its part of the vocabulary has."""
        if self.layout is None or not self.layout.axes("V"):
            return self.full(tokens)
        held = self.weight.shape[0]
        mine = self.layout.gather_tokens(tokens, "V") - held * self.layout.part_index("V")
        rows = self.full(jnp.clip(mine, 0, held - 1))
        is_held = (mine >= 0) & (mine < held)
        return self.layout.sum_over(
            jnp.where(is_held[:, None], rows, jnp.zeros((), rows.dtype)), "V"
        )

    @property
    def flat_weight(self) -> Weight:
        """The table as a weight [V D]."""
        return weight_of(self.weight, self.scale)


class FeedForward(nnx.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, placement: Placement, rngs: nnx.Rngs | None) -> None:
        self.layout, self.kernels = placement.layout, placement.kernels
        self.full_kernels = placement.full_kernels

        def linear(name: str, outputs: str, inputs: str) -> Linear:
            dtype = placement.dtype_of(f"feed_forward.{name}")
            return Linear(outputs, inputs, config, placement, rngs, dtype)

        self.gate, self.up = linear("gate", "F", "D"), linear("up", "F", "D")
        self.down = linear("down", "D", "F")

    def full(
        self, x: Hidden, capture: Capture = NOTHING, *, adapter: BlockAdapter = UNCHANGED
    ) -> Hidden:
        """x [*R D] -> [*R D]."""
        capture.record("feed_forward.in", x)
        with jax.named_scope("gate_up"):
            hidden = self.full_kernels.swiglu(
                self.gate.full(x, adapter.gate), self.up.full(x, adapter.up)
            )
        capture.record("feed_forward.down", hidden)
        with jax.named_scope("down"):
            return self.down.full(hidden, adapter.down)

    def paged(
        self,
        x: FlatHidden,
        adapters: Adapters = NO_ADAPTERS,
        capture: Capture = NOTHING,
        num_tokens: Scalar | None = None,
    ) -> FlatHidden:
        """x [T D] -> [T D]; without experts there is nothing to record, nor to leave out."""
        del capture, num_tokens
        stacks, slots = adapters
        if self.layout is not None:
            x = self.layout.gather_tokens(x, "F")
            slots = None if slots is None else self.layout.gather_tokens(slots, "F")
        beside = (stacks.gate, stacks.up)
        with jax.named_scope("gate_up"):
            gate, up = paged_together(x, self.gate, self.up, stacks=beside, slots=slots)
            hidden = self.kernels.swiglu(gate, up)
        with jax.named_scope("down"):
            out = self.down.paged(hidden, stacks.down, slots)
            return out if self.layout is None else self.layout.sum_over(out, "F")
