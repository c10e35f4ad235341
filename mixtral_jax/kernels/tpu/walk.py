"""The visits of a grouped product on TPU (tiles.py), as arrays that its kernel reads."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Walk(NamedTuple):
    """The visits in order, as arrays i32. E experts."""

    starts: jax.Array  # [E+1], the row where each group starts, and where the last one ends
    expert: jax.Array  # of each visit
    tile: jax.Array  # of rows, of each visit

    @classmethod
    def of(cls, sizes: jax.Array, rows: int, tile: int) -> tuple["Walk", jax.Array]:
        """The walk over so many rows, and the number of its visits; what follows is unspecified.

        It is written in comparisons of all with all, which become a few fused loops: megablox' own
        takes some thirty small programs, longer than it takes to read an expert.
        """
        experts = sizes.shape[0]
        index = jnp.arange(experts, dtype=jnp.int32)

        def before(counts: jax.Array) -> jax.Array:  # sum of the counts of the experts before
            is_before = index[None, :] < index[:, None]
            return jnp.sum(jnp.where(is_before, counts[None, :], 0), axis=1, dtype=jnp.int32)

        starts = before(sizes)
        first, last = starts // tile, (starts + sizes - 1) // tile
        counts = jnp.where(sizes > 0, last - first + 1, 0)
        visited = before(counts)
        visit = jnp.arange(rows // tile + experts - 1, dtype=jnp.int32)[:, None]
        is_own = (visit >= visited) & (visit < visited + counts)  # [visits, E]
        expert = jnp.sum(jnp.where(is_own, index, 0), axis=1, dtype=jnp.int32)
        own_tile = jnp.where(is_own, first + visit - visited, 0)
        ends = jnp.append(starts, jnp.sum(sizes, dtype=jnp.int32))
        walk = cls(ends, expert, jnp.sum(own_tile, axis=1, dtype=jnp.int32))
        return walk, jnp.sum(counts, dtype=jnp.int32)
