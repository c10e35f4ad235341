"""Pages of int8 in Mosaic GPU: read by the threads themselves.

A head's row is H values and the four bytes of its scale, so rows are aligned to four bytes, and
neither TMA nor cp.async moves less than 16. Each thread loads four values at a time, a warp a whole
row of 128, and puts them, multiplied by their scale as `cache.read` does, into shared memory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mixtral_jax.kernels.gpu.mosaic.warpgroup import ROWS, load, plgpu, store

_AT_ONCE = 4  # bytes that a thread loads
_WARPS, _LANES = 4, 32
_SHARED = 96 << 10  # bytes that a program has on every card from 8.0 on; an L4 has the fewest


class LoadedPage(NamedTuple):
    """The keys, or the values, of one head in a page, in registers."""

    values: jax.Array  # [Y H] int8
    scales: jax.Array  # [Y] f32

    @classmethod
    def of(cls, pages: Any, page: jax.Array, place: jax.Array, size: int) -> "LoadedPage":
        """Loads those at a place of the 2K of a page, from pages [P Y 2K H+4]."""
        layout = _by_rows(size)
        values = load(pages.at[page, :, place, pl.ds(0, size)], layout)
        # The four bytes of a float32, the lowest first.
        bits: Any = 0
        for byte in range(pages.shape[3] - size):
            of_byte = load(pages.at[page, :, place, size + byte], layout.reduce(1))
            bits = bits | ((of_byte.astype(jnp.int32) & 255) << 8 * byte)
        return cls(values, jax.lax.bitcast_convert_type(bits, jnp.float32))

    def store(self, room: Any) -> None:
        """Puts the numbers that are meant into a block of floats in shared memory [Y H]."""
        scales = jax.lax.broadcast_in_dim(self.scales, self.values.shape, (0,))
        store(room, (self.values.astype(jnp.float32) * scales).astype(room.dtype))


def fits_shared_memory(page_size: int, size: int) -> bool:
    """Says whether a page's keys and values of 16 bits have room beside what a tile holds."""
    widened = 2 * 2 * page_size * size
    return widened + ROWS * (2 * page_size + 4 * size) <= _SHARED


def _by_rows(size: int) -> Any:
    """The layout in which a warp has whole rows of H bytes, or 128 bytes of a longer one."""
    width = min(size, _LANES * _AT_ONCE)
    rows = _LANES * _AT_ONCE // width  # of a warp
    base = (_WARPS * rows, width)
    tiling: tuple[tuple[int, ...], ...]
    lanes: tuple[int, ...]
    if rows == 1:
        tiling, warps, lanes = (base, (_AT_ONCE,)), -3, (-2,)
    else:
        tiling, warps, lanes = (base, (rows, width), (_AT_ONCE,)), -5, (-3, -2)
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiling), warp_dims=(warps,), lane_dims=lanes, vector_dim=-1
    )
