"""Sizes of the tiles that a TPU's kernels work in."""

LANES = 128  # the last axis of a tile


def largest_tile(size: int, limit: int) -> int:
    """The largest multiple of LANES up to `limit` that divides `size` evenly."""
    return next(tile for tile in range(limit, 0, -LANES) if size % tile == 0)
