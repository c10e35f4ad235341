"""GatheredBlock: a layer whose arrays are cut over devices, and made whole where it is computed.

What a gradient recomputes then starts from the cut arrays: the whole ones live while one layer is
computed, forward or backward, and not from one pass to the other.
"""

from collections.abc import Callable

from mixtral_jax.axes import RowHidden, Segments
from mixtral_jax.model.adapter import UNCHANGED, BlockAdapter
from mixtral_jax.model.capture import NOTHING, Capture
from mixtral_jax.model.layers import Rotary
from mixtral_jax.model.transformer import Block

Gather = Callable[[Block, BlockAdapter], tuple[Block, BlockAdapter]]


class GatheredBlock(Block):
    """A block in the full form only.

    Args:
        block: with its arrays as they are kept.
        gather: makes the block, and the adapter beside it, that compute.
    """

    def __init__(self, block: Block, gather: Gather) -> None:
        self.kept, self.gather = block, gather

    def full(
        self,
        x: RowHidden,
        rotary: Rotary,
        capture: Capture = NOTHING,
        *,
        segments: Segments | None = None,
        adapter: BlockAdapter = UNCHANGED,
    ) -> RowHidden:
        """Whole rows: x [B T D] -> [B T D]; `capture` records values on the way."""
        block, adapter = self.gather(self.kept, adapter)
        return block.full(x, rotary, capture, segments=segments, adapter=adapter)
