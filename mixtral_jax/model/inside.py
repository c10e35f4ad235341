"""Inside: what a model did with some tokens: its routing, its attention, its hidden states.

    logits, inside = model(tokens, capture=("routing", "attention.3"))
    inside.choice            # [L B T X]: the experts of every token
    inside.expert_load()     # [L E]: the share of each expert
    inside.attention[3]      # [B N T T]: whom every query of layer 3 attended to

Values are recorded on the way of the full form; what is not asked for is not computed, and a call
without `capture` is the plain one.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int

from mixtral_jax.kernels.xla.attention import attention_weights
from mixtral_jax.model.capture import Capture

_ROUTING = frozenset({"router.logits", "router.choice", "router.weights"})
_ATTENTION = frozenset({"attention.q", "attention.k"})
_HIDDEN = frozenset({"block.in"})


class Inside(NamedTuple):
    """Values that were asked for, by layer; None or empty for others. A tree of arrays for jax.

    B rows, T tokens, L layers, E experts, X of them for each token, N query heads.
    """

    choice: Int[Array, "L B T X"] | None  # the experts of each token, the likeliest first
    weights: Float32[Array, "L B T X"] | None  # what each of them weighs in the sum
    probabilities: Float32[Array, "L B T E"] | None  # softmax over all experts
    hidden: Float[Array, "L+1 B T D"] | None  # what goes into each layer, and out of the last
    attention: dict[int, Float32[Array, "B N T T"]]  # by layer: query, then key

    def expert_load(self, counted: ArrayLike | None = None) -> Float32[Array, "L E"]:
        """The share of tokens that chose each expert, which sums to X in every layer.

        Args:
            counted: [B T], True for each token to count, False for padding; None counts them all.

        Raises ValueError where routing was not asked for, and for `counted` of another shape.
        """
        choice, probabilities = self._routing()
        picks = jax.nn.one_hot(choice, probabilities.shape[-1], dtype=jnp.float32)
        return _mean(jnp.sum(picks, axis=3), counted)

    def entropy(self, counted: ArrayLike | None = None) -> Float32[Array, " L"]:
        """The mean entropy of the router in each layer, in nats; log(E) where it cannot decide.

        Raises ValueError where routing was not asked for, and for `counted` of another shape.
        """
        _, probabilities = self._routing()
        surprise = jax.scipy.special.entr(probabilities).sum(axis=-1, keepdims=True)
        return _mean(surprise, counted)[:, 0]

    def __repr__(self) -> str:
        shapes = {
            **{
                name: array.shape
                for name, array in self._asdict().items()
                if name != "attention" and array is not None
            },
            **{f"attention[{layer}]": array.shape for layer, array in self.attention.items()},
        }
        return f"Inside({', '.join(f'{name} {[*shape]}' for name, shape in shapes.items())})"

    def _routing(self) -> tuple[jax.Array, jax.Array]:
        if self.choice is None or self.probabilities is None:
            raise ValueError(
                "the routing was not recorded; give capture=('routing',), of a mixture"
            )
        return self.choice, self.probabilities


def _mean(values: jax.Array, counted: ArrayLike | None) -> jax.Array:
    """Mean over rows and tokens: [L B T E] -> [L E]."""
    if counted is None:
        return jnp.mean(values, axis=(1, 2))
    counted = jnp.asarray(counted)
    if counted.shape != values.shape[1:3]:
        raise ValueError(
            f"counted has the shape {[*counted.shape]}; give one True or False for each of the "
            f"tokens {[*values.shape[1:3]]} that were recorded"
        )
    weights = counted.astype(jnp.float32)[None, :, :, None]
    return jnp.sum(values * weights, axis=(1, 2)) / jnp.maximum(1.0, jnp.sum(weights))


def captures_for(names: Collection[str], num_layers: int, is_moe: bool) -> list[Capture]:
    """One capture for each layer that records what `inside_of` needs for these names.

    Args:
        names: of "routing", "hidden", "attention" (of all layers) and "attention.3" (of one).

    Raises ValueError for another name, a layer that is not there, and routing without experts.
    """
    if isinstance(names, str):
        names = (names,)
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"capture is {names!r}; give names, such as ('routing', 'attention.3')")
    wanted: list[set[str]] = [set() for _ in range(num_layers)]
    for name in names:
        kind, _, number = name.partition(".")
        if name == "routing" and not is_moe:
            raise ValueError("this model has no experts; leave 'routing' out of capture")
        layers: Sequence[int] = range(num_layers)
        if kind == "attention" and number.isascii() and number.isdigit():
            if len(number) > 4 or int(number) >= num_layers:
                raise ValueError(f"there is no layer {number}; they are 0 to {num_layers - 1}")
            layers = (int(number),)
        elif name not in ("routing", "hidden", "attention"):
            raise ValueError(
                f"capture does not know {name!r}; give 'routing', 'hidden', 'attention' or the "
                "attention of a layer, such as 'attention.3'"
            )
        values = {"routing": _ROUTING, "hidden": _HIDDEN, "attention": _ATTENTION}[kind]
        for layer in layers:
            wanted[layer] |= values
        if name == "hidden":
            wanted[-1] |= {"block.out"}
    return [Capture(values) for values in wanted]


def inside_of(captures: Sequence[Capture], rows: tuple[int, ...], window: int | None) -> Inside:
    """Puts together what the captures of `captures_for` recorded.

    Args:
        captures: one of each layer, after the run.
        rows: B and T.
        window: of the attention.
    """
    values = [capture.values for capture in captures]
    choice = weights = probabilities = hidden = None
    if values and "router.choice" in values[0]:
        by_token = {
            name: jnp.stack([layer[name] for layer in values]).reshape(len(values), *rows, -1)
            for name in _ROUTING
        }
        choice, weights = by_token["router.choice"], by_token["router.weights"]
        logits = by_token["router.logits"].astype(jnp.float32)
        probabilities = jax.nn.softmax(logits, axis=-1)
    if values and "block.in" in values[0]:
        inputs = [layer["block.in"] for layer in values]
        hidden = jnp.stack([*inputs, values[-1]["block.out"]])
    attention = {
        number: attention_weights(layer["attention.q"], layer["attention.k"], window)
        for number, layer in enumerate(values)
        if "attention.q" in layer
    }
    return Inside(choice, weights, probabilities, hidden, attention)
