"""The small layers: RMSNorm, rotary embedding, Linear, Embedding, FeedForward.

Weights keep the `[out, in]` order that Hugging Face stores, so a converter copies bytes, and
matrix products contract the weight's last axes, which is the fast order on CPU.

With dtype int8 (W8A8) a weight is int8 with one float32 scale for each output, and the rows that
meet it are rounded to int8 as they come, with one scale for each row; the product is exact in
int32. Everything between the products, and small weights (norms, routers), stays float32.

Layers have two forms, as attention has: full (any backend, differentiable) and paged (serving; on
CPU by the kernels of native.py). Under a mesh the full form sees whole arrays, and the compiler
splits them; the paged form runs on one device's parts of them, and sums up by `Layout`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mixtral_jax.axes import FlatHidden, Hidden, Positions
from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.cpu import native
from mixtral_jax.sharding import Layout


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
    """x / rms(x) * weight, normalised in f32 (arXiv:1910.07467)."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs | None) -> None:
        self.weight = parameter("D", config, dtype, rngs)
        if rngs is not None:
            self.weight.set_value(jnp.ones(config.hidden_size, dtype))
        self.eps = config.norm_eps

    def full(self, x: Hidden) -> Hidden:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * scale).astype(x.dtype) * weight

    def paged(self, x: FlatHidden) -> FlatHidden:
        def on_cpu() -> jax.Array:
            return native.norm(x, self.weight[...], self.eps)

        if x.dtype != jnp.float32:
            return self.full(x)
        return native.on_cpu(on_cpu, lambda: self.full(x))


class Rotary(NamedTuple):
    """Rotation of each position (arXiv:2104.09864), half-split as in Hugging Face.

    `cos` and `sin` are f32 [*R 1 H/2]: the 1 stands for the heads.
    """

    cos: jax.Array
    sin: jax.Array

    @classmethod
    def at(cls, positions: Positions, config: ModelConfig) -> "Rotary":
        half = config.head_size // 2
        frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angle = positions[..., None, None].astype(jnp.float32) * frequency.reshape(
            (1,) * (positions.ndim + 1) + (-1,)
        )
        return cls(jnp.cos(angle), jnp.sin(angle))

    def rotate(self, x: jax.Array) -> jax.Array:
        """Rotates heads [*R N H] or [*R K H]; computed in f32, returned in the dtype of x."""
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = (
            first * self.cos - second * self.sin,
            second * self.cos + first * self.sin,
        )
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Scaled(NamedTuple):
    """A weight [*O I] for products over its last axis, as arrays."""

    values: jax.Array  # float, or int8
    scale: jax.Array | None  # [*O] f32 for int8: weight = values * scale

    @classmethod
    def quantized(cls, weight: jax.Array) -> "Scaled":
        """Rounds a float weight to int8, symmetrically, the largest of each output to 127."""
        wide = weight.astype(jnp.float32)
        scale = jnp.max(jnp.abs(wide), axis=-1) / 127
        values = jnp.round(wide / jnp.maximum(scale, 1e-30)[..., None])
        return cls(values.astype(jnp.int8), scale)

    @classmethod
    def of(cls, weight: nnx.Param, scale: nnx.Param | None) -> "Scaled":
        """What `weight_parameters` made."""
        return cls(weight[...], None if scale is None else scale[...])

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        return (self.values,) if self.scale is None else (self.values, self.scale)

    def product(self, x: jax.Array) -> jax.Array:
        """x [R I] -> [R O] for a weight of two axes, in the dtype of x."""
        if self.scale is None:
            return jnp.einsum("RI,OI->RO", x, self.values)
        rows, x_scale = quantize_rows(x)
        # XLA:CPU has no fast path for fewer than eight rows of int8.
        rows = jnp.pad(rows, ((0, max(0, 8 - x.shape[0])), (0, 0)))
        total = jnp.einsum("RI,OI->RO", rows, self.values, preferred_element_type=jnp.int32)
        total = total[: x.shape[0]].astype(jnp.float32)
        return (total * (x_scale[:, None] * self.scale[None, :])).astype(x.dtype)


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows [R I] as int8 and one f32 scale [R] each: x = values * scale, up to rounding."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    inverse = jnp.where(scale > 0, 1 / jnp.maximum(scale, 1e-38), 0)
    return jnp.round(wide * inverse[:, None]).astype(jnp.int8), scale


class Linear(nnx.Module):
    """y = x @ weight^T for a weight whose letters are `outputs` + `inputs`; no bias."""

    def __init__(
        self,
        outputs: str,
        inputs: str,
        config: ModelConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ) -> None:
        self.weight, self.scale = weight_parameters(outputs, inputs, config, dtype, rngs)
        self.num_inputs = len(inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [*R inputs] -> [*R outputs]."""
        rows = x.shape[: x.ndim - self.num_inputs]
        # One axis in and one out: on CPU two contracted axes take a path that is twice as slow.
        flat = x.reshape(math.prod(rows), -1)
        return self.shaped(self.scaled.product(flat), rows)

    @property
    def scaled(self) -> Scaled:
        """The weight as [O I], its axes on either side made one."""
        outputs = math.prod(self.weight.shape[: -self.num_inputs])
        scale = None if self.scale is None else self.scale[...].reshape(outputs)
        return Scaled(self.weight[...].reshape(outputs, -1), scale)

    def shaped(self, y: jax.Array, rows: tuple[int, ...]) -> jax.Array:
        return y.reshape(*rows, *self.weight.shape[: -self.num_inputs])


def products(x: jax.Array, *weights: Scaled) -> list[jax.Array]:
    """What each weight gives for the same rows [R I]; `Scaled.product`, on CPU by our kernel."""

    def xla() -> list[jax.Array]:
        return [weight.product(x) for weight in weights]

    def on_cpu() -> list[jax.Array]:
        return native.linear(x, [weight.arrays for weight in weights])

    # The kernels compute in float32; a bfloat16 model on CPU is for trying things out.
    return native.on_cpu(on_cpu, xla) if x.dtype == jnp.float32 else xla()


def project(x: jax.Array, *linears: Linear) -> list[jax.Array]:
    """The paged form of Linear, for several that share their rows: x [T inputs] -> [T outputs]."""
    out = products(x.reshape(x.shape[0], -1), *(linear.scaled for linear in linears))
    return [linear.shaped(y, x.shape[:1]) for linear, y in zip(linears, out, strict=True)]


def weight_parameters(
    outputs: str, inputs: str, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs | None
) -> tuple[nnx.Param, nnx.Param | None]:
    """A weight and, for int8, the scales of its outputs."""
    if jnp.dtype(dtype) != jnp.int8:
        return parameter(outputs + inputs, config, dtype, rngs), None
    weight = parameter(outputs + inputs, config, jnp.float32, rngs)
    scale = parameter(outputs, config, jnp.float32, None)
    if rngs is None:
        weight.set_value(jax.ShapeDtypeStruct(weight.shape, jnp.int8))
        return weight, scale
    flat = weight[...].reshape(*weight.shape[: len(outputs)], -1)
    scaled = Scaled.quantized(flat)
    weight.set_value(scaled.values.reshape(weight.shape))
    scale.set_value(scaled.scale)
    return weight, scale


def activation_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype between the products of a model: its own, or float32 for int8."""
    return jnp.float32 if jnp.dtype(dtype) == jnp.int8 else dtype


class Embedding(nnx.Module):
    """Rows of a table for tokens, and, where embeddings are tied, the head that scores them."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
        layout: Layout | None = None,
    ) -> None:
        self.weight, self.scale = weight_parameters("V", "D", config, dtype, rngs)
        self.layout = layout

    def paged(self, tokens: jax.Array) -> FlatHidden:
        """tokens [T] -> [T D]; each device looks up what its part of the vocabulary has."""
        if self.layout is None or not self.layout.axes("V"):
            return self(tokens)
        held = self.weight.shape[0]
        mine = self.layout.gather(tokens, "V") - held * self.layout.index("V")
        rows = self(jnp.clip(mine, 0, held - 1))
        is_held = (mine >= 0) & (mine < held)
        return self.layout.total(jnp.where(is_held[:, None], rows, jnp.zeros((), rows.dtype)), "V")

    def __call__(self, tokens: jax.Array) -> Hidden:
        rows = self.weight[...][tokens]
        if self.scale is None:
            return rows
        return rows.astype(jnp.float32) * self.scale[...][tokens][..., None]

    @property
    def scaled(self) -> Scaled:
        return Scaled.of(self.weight, self.scale)


class FeedForward(nnx.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
        layout: Layout | None = None,
    ) -> None:
        self.layout = layout
        self.gate = Linear("F", "D", config, dtype, rngs)
        self.up = Linear("F", "D", config, dtype, rngs)
        self.down = Linear("D", "F", config, dtype, rngs)

    def full(self, x: Hidden) -> Hidden:
        down: jax.Array = self.down(jax.nn.silu(self.gate(x)) * self.up(x))
        return down

    def paged(self, x: FlatHidden) -> FlatHidden:
        if self.layout is not None:
            x = self.layout.gather(x, "F")
        gate, up = project(x, self.gate, self.up)

        def on_cpu() -> jax.Array:
            return native.swiglu(gate, up)

        def xla() -> jax.Array:
            return jax.nn.silu(gate) * up

        # XLA:CPU gives it one thread, and takes a twelfth of a prompt's time for it.
        hidden = native.on_cpu(on_cpu, xla) if x.dtype == jnp.float32 else xla()
        out = project(hidden, self.down)[0]
        return out if self.layout is None else self.layout.total(out, "F")
