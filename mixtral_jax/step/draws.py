"""Draws: the tokens and logprobs of a step's rows, in one array on their way to the host.

A row has its token, its logprob, and ids and logprobs of the 20 likeliest tokens; floats are there
as their bits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.axes import (
    HostPackedDraws,
    HostRowFloats,
    HostRows,
    HostTopIds,
    HostTopLogprobs,
    PackedDraws,
    Rows,
)

NO_TOKEN = -1  # of a row whose logits are not finite


class Draws(NamedTuple):
    """Draws of the rows of a step, on the host. Logprobs that were not asked for are 0."""

    tokens: HostRows  # NO_TOKEN where the logits are not finite
    logprobs: HostRowFloats
    top_ids: HostTopIds  # likeliest first; where the vocabulary is smaller, logprobs of -inf
    top_logprobs: HostTopLogprobs

    def of_row(
        self, row: int, top_logprobs: int | None
    ) -> tuple[int, float | None, tuple[tuple[int, float], ...]]:
        """Returns a row's token, its logprob, and (token id, logprob) of the likeliest tokens.

        `top_logprobs` is what the row asked for; with None there are no logprobs at all.
        """
        token = int(self.tokens[row])
        if top_logprobs is None:
            return token, None, ()
        ids, values = self.top_ids[row, :top_logprobs], self.top_logprobs[row, :top_logprobs]
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return token, float(self.logprobs[row]), top


def unpack(packed: HostPackedDraws) -> Draws:
    """Takes apart what `pack` made."""
    ids, values = np.split(packed[:, 2:], 2, axis=1)
    return Draws(packed[:, 0], packed[:, 1].view(np.float32), ids, values.view(np.float32))


def pack(tokens: Rows, own: jax.Array, ids: jax.Array, values: jax.Array) -> PackedDraws:
    """Puts what each row drew into one array for the host.

    Args:
        tokens: [R] i32.
        own: their logprobs [R 1] f32.
        ids: of the 20 likeliest tokens [R 20] i32.
        values: the logprobs of these [R 20] f32.
    """
    bits = [jax.lax.bitcast_convert_type(floats, jnp.int32) for floats in (own, values)]
    return jnp.concatenate([tokens[:, None], bits[0], ids, bits[1]], axis=1)
