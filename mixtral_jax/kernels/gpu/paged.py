"""Attention over pages on GPU, put together of a form's own kernels for decodes and prompts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mixtral_jax.axes import FlatQueries
from mixtral_jax.cache import RaggedBatch


def decodes_and_prompts(
    q: FlatQueries,
    batch: RaggedBatch,
    decode: Callable[[jax.Array], jax.Array],
    prefill: Callable[[], jax.Array],
) -> FlatQueries:
    """Attention of a step's tokens [T N H]; unused places of the batch are zero.

    Args:
        q: queries of all tokens.
        batch: of the step; its decodes come first.
        decode: one query of each sequence [S N H] -> [S N H], which is zero for those that bring
            more tokens.
        prefill: gives [T N H], which is right where a sequence brings more than one token.
    """
    tokens, rows = q.shape[0], batch.lengths.shape[0]
    room = max(tokens, rows)
    out = decode(jnp.pad(q, ((0, room - tokens), (0, 0), (0, 0)))[:rows])
    out = jnp.pad(out, ((0, room - rows), (0, 0), (0, 0)))[:tokens]
    if tokens > 1:
        place = jnp.arange(tokens, dtype=jnp.int32)[:, None, None]
        is_prompt = place >= batch.num_decodes
        is_prompt &= place < batch.query_starts[batch.num_sequences]
        out = jnp.where(is_prompt, prefill(), out.astype(q.dtype))
    return out.astype(q.dtype)
