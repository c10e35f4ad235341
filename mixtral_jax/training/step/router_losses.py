"""Losses of routers, and the load of experts that they balance.

The load balancing loss is the one of transformers 5 (models/mixtral/modeling_mixtral.py):

    aux = E * sum over e of f(e) * P(e)

f(e) is how often expert e was picked, and P(e) the mean of its probability, both over all layers
and all tokens of the whole step that are no padding. A balanced mixture has aux = X. As f comes of
choices it has no gradient, and P is a mean: with f known, the loss of a step is the sum of those of
its micro-batches.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.model.capture import Capture

CAPTURED = ("router.logits", "router.choice")


class RouterSums(NamedTuple):
    """Sums over the tokens of some rows. A token counts where it is no padding."""

    picks: jax.Array  # [L E] f32, how often each expert was picked
    probabilities: jax.Array  # [L E] f32, the sum of its probability
    squares: jax.Array  # [] f32, the sum over layers of log-normaliser squared

    @classmethod
    def of(cls, captures: Sequence[Capture], counts: jax.Array) -> "RouterSums":
        """Sums up what the layers' routers gave; `counts` [B T] is true for tokens that count."""
        is_token = counts.reshape(-1).astype(jnp.float32)
        picks, probabilities = [], []
        squares = jnp.zeros((), jnp.float32)
        for capture in captures:
            logits = capture.values["router.logits"].astype(jnp.float32)
            choice = capture.values["router.choice"]
            chosen = jax.nn.one_hot(choice, logits.shape[1], dtype=jnp.float32)
            picks.append(jnp.einsum("TXE,T->E", chosen, is_token))
            probabilities.append(jnp.einsum("TE,T->E", jax.nn.softmax(logits), is_token))
            normalisers = jax.nn.logsumexp(logits, axis=-1)
            squares += jnp.sum(jnp.square(normalisers) * is_token)
        return cls(jnp.stack(picks), jnp.stack(probabilities), squares)

    def aux(self, picks: jax.Array, tokens: jax.Array) -> jax.Array:
        """The load balancing loss that these rows add to that of a step.

        Args:
            picks: how often the whole step picks each expert [L E].
            tokens: number of tokens of the whole step.
        """
        layers, experts = picks.shape
        pooled = layers * tokens
        frequency = jax.lax.stop_gradient(jnp.sum(picks, axis=0)) / pooled
        return experts * jnp.sum(frequency * jnp.sum(self.probabilities, axis=0) / pooled)

    @property
    def load(self) -> jax.Array:
        """Each expert's share of its layer's picks [L E]."""
        return self.picks / jnp.sum(self.picks, axis=1, keepdims=True)

    def z(self, tokens: jax.Array) -> jax.Array:
        """The mean square of the log-normalisers that these rows add to that of a step."""
        return self.squares / (self.picks.shape[0] * tokens)
