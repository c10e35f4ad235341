"""Adapter: low-rank matrices beside the weights of a model that stays as it is (LoRA).

A target with the weight W [O I] computes Wx + B(Ax) * scaling, for A [U I] and B [O U] of a rank U
that is small beside O and I (arXiv:2106.09685). Experts have an A and a B each. The arrays are no
parameters of the modules: whoever runs a model passes an Adapter along, so that one model serves
many of them, and `jax.grad` of an adapter never touches the model.

The forward pass knows no scaling: `Adapter.folded` multiplies it into B.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.layout import Layout

# Target -> letters of its outputs and of its inputs. The router is the only one that is not in a
# dense model; gate, up and down have an E before their outputs in a mixture.
_LETTERS: Mapping[str, tuple[str, str]] = {
    "q": ("NH", "D"),
    "k": ("KH", "D"),
    "v": ("KH", "D"),
    "o": ("D", "NH"),
    "router": ("Q", "D"),
    "gate": ("F", "D"),
    "up": ("F", "D"),
    "down": ("D", "F"),
}
TARGETS = tuple(_LETTERS)
FEED_FORWARD = ("gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Names the weights of every layer that an adapter changes, and how.

    Args:
        targets: names out of TARGETS, in that order.
        rank: U, at least 1.
        alpha: the scaling is alpha / rank.
        rank_stabilized: the scaling is alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732).

    Raises ConfigError for targets that do not exist, and for numbers out of range.
    """

    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    rank: int = 16
    alpha: float = 32.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            wrong = f"{unknown[0]!r} is no target" if unknown else "there are no targets"
            raise ConfigError(f"{wrong} of an adapter; choose from {', '.join(TARGETS)}")
        object.__setattr__(self, "targets", tuple(n for n in TARGETS if n in self.targets))
        if self.rank < 1:
            raise ConfigError(f"an adapter's rank is {self.rank}; give 1 or more, such as 16")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"an adapter's alpha is {self.alpha}; give a number above 0")

    @property
    def scaling(self) -> float:
        """The factor of B(Ax)."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError for a target that the model does not have."""
        if "router" in self.targets and not config.is_moe:
            raise ConfigError("this model has no router; leave it out of the adapter's targets")


class LowRank(NamedTuple):
    """The two matrices beside one weight: a [U *I] and b [*O U]; of experts, each with E first."""

    a: jax.Array
    b: jax.Array

    def product(self, x: jax.Array) -> jax.Array:
        """B(Ax) of a weight that has no experts: x [R I] -> [R O], in the dtype of x."""
        a = self.a.reshape(self.a.shape[0], -1).astype(x.dtype)
        b = self.b.reshape(-1, self.b.shape[-1]).astype(x.dtype)
        return jnp.einsum("RU,OU->RO", jnp.einsum("RI,UI->RU", x, a), b)


class BlockAdapter(NamedTuple):
    """The matrices of one layer; None beside the weights that stay as they are."""

    q: LowRank | None = None
    k: LowRank | None = None
    v: LowRank | None = None
    o: LowRank | None = None
    router: LowRank | None = None
    gate: LowRank | None = None
    up: LowRank | None = None
    down: LowRank | None = None


UNCHANGED = BlockAdapter()


class Adapter(NamedTuple):
    """The matrices of all layers: a tree of arrays that jax transforms as it is."""

    layers: tuple[BlockAdapter, ...]

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        adapter: AdapterConfig,
        key: jax.Array | None,
        layout: Layout | None = None,
    ) -> "Adapter":
        """A new adapter in float32, which changes nothing yet: B is zero.

        A is uniform in +-1/sqrt(inputs), as PEFT's default makes it. Without a key the arrays are
        ShapeDtypeStructs. Under a mesh each is split by its letters (`adapter_letters`).
        """
        adapter.check(config)
        layers = []
        for layer in range(config.num_layers):
            made = {}
            for i, target in enumerate(adapter.targets):
                a, b = adapter_letters(target, config)
                own = None if key is None else jax.random.fold_in(key, layer * len(TARGETS) + i)
                inputs = math.prod(config.axis_sizes[x] for x in _LETTERS[target][1])
                made[target] = LowRank(
                    _array(a, config, adapter.rank, own, inputs**-0.5, layout),
                    _array(b, config, adapter.rank, own, 0.0, layout),
                )
            layers.append(BlockAdapter(**made))
        return cls(tuple(layers))

    def pairs(self) -> Iterator[tuple[int, str, LowRank]]:
        """Yields layer, target and matrices of each weight that is changed."""
        for layer, block in enumerate(self.layers):
            for target, low in block._asdict().items():
                if low is not None:
                    yield layer, target, low

    def folded(self, adapter: AdapterConfig) -> "Adapter":
        """The same with the scaling multiplied into B, as the model's forward pass takes it."""

        def fold(low: LowRank) -> LowRank:
            return LowRank(low.a, low.b * jnp.asarray(adapter.scaling, low.b.dtype))

        return jax.tree.map(fold, self, is_leaf=lambda node: isinstance(node, LowRank))


def adapter_letters(target: str, config: ModelConfig) -> tuple[str, str]:
    """The letters of a target's A and B in this model, such as UD and NHU; EUD and EFU."""
    outputs, inputs = _LETTERS[target]
    experts = "E" if config.is_moe and target in FEED_FORWARD else ""
    return f"{experts}U{inputs}", f"{experts}{outputs}U"


def placed(adapter: Adapter, config: ModelConfig, layout: Layout | None) -> Adapter:
    """Puts arrays of the host onto the devices of a layout, each split by its letters."""
    layers = []
    for block in adapter.layers:
        made = {}
        for target, low in block._asdict().items():
            if low is not None:
                letters = adapter_letters(target, config)
                made[target] = LowRank(
                    *(_put(x, y, layout) for x, y in zip(low, letters, strict=True))
                )
        layers.append(BlockAdapter(**made))
    return Adapter(tuple(layers))


def _put(array: Any, letters: str, layout: Layout | None) -> jax.Array:
    return jnp.asarray(array) if layout is None else jax.device_put(array, layout.sharding(letters))


def weight_name(target: str) -> str:
    """The name of a target's weight within its layer, such as attention.q.weight."""
    room = "attention" if target in ("q", "k", "v", "o") else "feed_forward"
    return f"{room}.{target}.weight"


def _array(
    letters: str,
    config: ModelConfig,
    rank: int,
    key: jax.Array | None,
    bound: float,
    layout: Layout | None,
) -> Any:
    sizes = config.axis_sizes | {"U": rank}
    shape = tuple(sizes[letter] for letter in letters)
    sharding = None if layout is None else layout.sharding(letters)
    if key is None:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    values = jax.random.uniform(key, shape, jnp.float32, -bound, bound) if bound else None
    array = jnp.zeros(shape, jnp.float32) if values is None else values
    return array if sharding is None else jax.device_put(array, sharding)
