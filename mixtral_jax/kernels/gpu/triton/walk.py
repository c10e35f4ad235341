"""The tiles of rows that a grouped product's programs compute."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32


class Walk(NamedTuple):
    """The tiles of rows, with the expert, the first row and the row behind the group of each.

    Each group takes whole tiles; the last one of it reaches into the next group, whose rows it does
    not write. Tiles behind those of the last group begin at or behind its end and have no rows.
    """

    expert: Int32[jax.Array, " T"]
    first: Int32[jax.Array, " T"]
    end: Int32[jax.Array, " T"]

    @classmethod
    def of(cls, sizes: jax.Array | None, rows: int, tile: int) -> "Walk":
        """The tiles of `tile` rows for groups of these sizes [E] in so many rows.

        Without sizes all rows are of one group.
        """
        if sizes is None:  # known here, so nothing is computed on the card
            of_all = np.arange(0, rows, tile, dtype=np.int32)
            known = (np.zeros_like(of_all), of_all, np.full_like(of_all, rows))
            return cls(*map(jnp.asarray, known))
        experts = sizes.shape[0]
        ends, tiles = jnp.cumsum(sizes), -(-sizes // tile)
        last = jnp.cumsum(tiles)
        index = jnp.arange(-(-rows // tile) + experts, dtype=jnp.int32)
        # Compared with all at once: a search in steps is a loop of programs.
        owner = jnp.searchsorted(last, index, side="right", method="compare_all")
        expert = jnp.minimum(owner, experts - 1).astype(jnp.int32)
        first = (ends - sizes)[expert] + (index - (last - tiles)[expert]) * tile
        return cls(expert, first.astype(jnp.int32), ends[expert])
