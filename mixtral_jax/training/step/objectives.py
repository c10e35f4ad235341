"""The losses that a run can lower: of the targets of texts, and of pairs of answers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.model.adapter import Adapter
from mixtral_jax.model.capture import Capture
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.training.batch import Batch, PreferenceBatch
from mixtral_jax.training.config import TrainingConfig
from mixtral_jax.training.step.loss import row_losses
from mixtral_jax.training.step.router_losses import CAPTURED, RouterSums


class RowSums(NamedTuple):
    """Sums over some rows of a step, which add up to those of the step; scalars are f32."""

    loss: jax.Array
    preferred: jax.Array  # pairs of which the preferred answer has the larger margin
    margin: jax.Array  # beta * (log-ratio of the preferred answer - that of the other)
    router: RouterSums | None


def rows_of(batch: Batch | PreferenceBatch) -> Batch:
    """The rows that the model reads."""
    return batch.rows if isinstance(batch, PreferenceBatch) else batch


def divisor(batch: Batch | PreferenceBatch) -> jax.Array:
    """The number that a step's loss is divided by: the weight of its targets, or its pairs."""
    if isinstance(batch, PreferenceBatch):
        return jnp.sum(_is_pair(batch).astype(jnp.float32))
    return jnp.sum(batch.weights)


def num_tokens(batch: Batch | PreferenceBatch) -> jax.Array:
    """Positions of all rows that are no padding, as f32."""
    masks = (leaf.segments for leaf in _batches(batch))
    return sum((jnp.sum((mask != 0).astype(jnp.float32)) for mask in masks), jnp.zeros(()))


def sums_of(
    model: Transformer,
    adapter: Adapter | None,
    batch: Batch | PreferenceBatch,
    config: TrainingConfig,
) -> RowSums:
    """The sums over some rows, by the objective of the settings."""
    if isinstance(batch, PreferenceBatch):
        return preference_sums(model, adapter, batch, config)
    return supervised_sums(model, adapter, batch, config)


def supervised_sums(
    model: Transformer, adapter: Adapter | None, rows: Batch, config: TrainingConfig
) -> RowSums:
    """Cross-entropy of the targets of some rows, times their weights, and the routers' sums."""
    losses, router = _forward(model, adapter, rows, config.recompute)
    zero = jnp.zeros((), jnp.float32)
    return RowSums(jnp.sum(losses), zero, zero, router)


def preference_sums(
    model: Transformer, adapter: Adapter | None, pairs: PreferenceBatch, config: TrainingConfig
) -> RowSums:
    """The sigmoid loss of direct preference optimisation over some pairs (arXiv:2305.18290).

    The reference is the model without the adapter, computed in the same step.
    """
    rows = pairs.rows
    policy, router = _forward(model, adapter, rows, config.recompute)
    reference = jax.lax.stop_gradient(_forward(model, None, rows, False)[0])
    # Losses are negative log-probabilities of answers, so ratios are reference less policy.
    chosen, rejected = jnp.split(reference - policy, 2)
    margin = config.beta * (chosen - rejected)
    return RowSums(
        loss=-jnp.sum(jnp.where(_is_pair(pairs), jax.nn.log_sigmoid(margin), 0.0)),
        preferred=jnp.sum((margin > 0).astype(jnp.float32)),
        margin=jnp.sum(margin),
        router=router,
    )


def _is_pair(pairs: PreferenceBatch) -> jax.Array:
    """[B], false for the empty pairs that fill up an epoch's last step."""
    return jnp.any(pairs.chosen.weights > 0, axis=1)


def captures_of(model: Transformer) -> list[Capture] | None:
    """Captures of the routers' outputs, one for each layer; None in a dense model."""
    return [Capture(CAPTURED) for _ in model.layers] if model.config.is_moe else None


def _forward(
    model: Transformer, adapter: Adapter | None, rows: Batch, is_recomputed: bool
) -> tuple[jax.Array, RouterSums | None]:
    """The loss of each row [B], and the routers' sums."""
    captures = captures_of(model)
    hidden = model.hidden(
        rows.tokens,
        segments=rows.segments,
        adapter=adapter,
        captures=captures,
        is_recomputed=is_recomputed,
    )
    losses = row_losses(model, hidden, rows.targets, rows.weights)
    return losses, RouterSums.of(captures, rows.segments != 0) if captures else None


def _batches(batch: Any) -> tuple[Batch, ...]:
    return (batch.chosen, batch.rejected) if isinstance(batch, PreferenceBatch) else (batch,)
