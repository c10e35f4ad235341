"""Cross-entropy of the targets, without all logits in memory at once."""

import jax
import jax.numpy as jnp

from mixtral_jax.axes import RowHidden
from mixtral_jax.model.transformer import Transformer

# Logits of one device that exist at once. The backward pass has about three arrays of this size.
LOGIT_BYTES = 64 << 20


def row_losses(
    model: Transformer,
    hidden: RowHidden,
    targets: jax.Array,
    weights: jax.Array,
    logit_bytes: int = LOGIT_BYTES,
) -> jax.Array:
    """The sum of -weight * log p(target) over the positions of each row: [B] f32.

    Positions come in chunks, whose logits [B C V] f32 take at most `logit_bytes` on a device, and
    are computed a second time by the backward pass.

    Args:
        model: its head makes the logits.
        hidden: final hidden states [B T D].
        targets: [B T] i32.
        weights: [B T] f32; 0 where there is no target.
        logit_bytes: bound of one chunk, which has one position of each row at least.
    """
    rows, length, _ = hidden.shape
    chunk = chunk_length(model, rows, length, logit_bytes)

    def losses(x: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        logits = model.logits(x)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        minus_log_p = jax.nn.logsumexp(logits, axis=-1) - chosen
        return jnp.sum(minus_log_p * weights, axis=1)

    if chunk >= length:
        return losses(hidden, targets, weights)
    count = -(-length // chunk)
    chunk = -(-length // count)  # equal chunks, or the last one would be mostly padding

    def cut(x: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2)
        parts = jnp.pad(x, padding).reshape(rows, count, chunk, *x.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(losses)(*chunk), None

    start = jnp.zeros(rows, jnp.float32)
    return jax.lax.scan(add, start, (cut(hidden), cut(targets), cut(weights)))[0]


def chunk_length(model: Transformer, rows: int, length: int, logit_bytes: int) -> int:
    """Positions of each row whose logits are computed together, such that they fit the bound."""
    layout = model.layout
    split = 1 if layout is None else layout.rules.ways("V", layout.mesh)
    groups = 1 if layout is None else layout.num_sequence_groups
    held = -(-rows // groups) * model.config.vocab_size * 4 // split
    return max(1, min(length, logit_bytes // held))
