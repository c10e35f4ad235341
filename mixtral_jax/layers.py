"""The small layers: RMSNorm, rotary embedding, Linear, Embedding, FeedForward.

Weights keep the `[out, in]` order that Hugging Face stores, so a converter copies bytes, and
matrix products contract the weight's last axes, which is the fast order on CPU.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mixtral_jax.axes import Hidden, Positions
from mixtral_jax.config import ModelConfig


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

    def __call__(self, x: Hidden) -> Hidden:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * scale).astype(x.dtype) * weight


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
        self.weight = parameter(outputs + inputs, config, dtype, rngs)
        self.num_inputs = len(inputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [*R inputs] -> [*R outputs]."""
        weight = self.weight[...]
        outputs = weight.shape[: -self.num_inputs]
        rows = x.shape[: x.ndim - self.num_inputs]
        # One axis in and one out: on CPU two contracted axes take a path that is twice as slow.
        flat = weight.reshape(math.prod(outputs), -1)
        return jnp.einsum("...i,oi->...o", x.reshape(*rows, -1), flat).reshape(*rows, *outputs)


class Embedding(nnx.Module):
    """Rows of a table for tokens, and, where embeddings are tied, the head that scores them."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs | None) -> None:
        self.weight = parameter("VD", config, dtype, rngs)

    def __call__(self, tokens: jax.Array) -> Hidden:
        return self.weight[...][tokens]

    def score(self, x: Hidden) -> jax.Array:
        """Logits [*R V] of hidden states [*R D]."""
        return jnp.einsum("...D,VD->...V", x, self.weight[...])


class FeedForward(nnx.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs | None) -> None:
        self.gate = Linear("F", "D", config, dtype, rngs)
        self.up = Linear("F", "D", config, dtype, rngs)
        self.down = Linear("D", "F", config, dtype, rngs)

    def __call__(self, x: Hidden) -> Hidden:
        down: jax.Array = self.down(jax.nn.silu(self.gate(x)) * self.up(x))
        return down
