"""Grouped-query attention (arXiv:2305.13245) with an optional sliding window (arXiv:2310.06825).

Two equal forms. Full sequence: every row of a batch sees itself; training and parity. Paged: new
tokens of many sequences in one flat row, keys and values in pages. The arithmetic of both stands in
`mixtral_jax/kernels`.
"""

import jax
from flax import nnx

from mixtral_jax.axes import FlatHidden, Pages, RowHidden, Segments
from mixtral_jax.cache import RaggedBatch
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.adapter import UNCHANGED, BlockAdapter
from mixtral_jax.model.adapter_stack import NO_ADAPTERS, Adapters
from mixtral_jax.model.capture import NOTHING, Capture
from mixtral_jax.model.layers import Linear, Rotary, paged_together
from mixtral_jax.placement import Placement


class Attention(nnx.Module):
    """Projections and both forms of attention of one layer."""

    def __init__(self, config: ModelConfig, placement: Placement, rngs: nnx.Rngs | None) -> None:
        self.layout, self.kernels = placement.layout, placement.kernels

        def linear(name: str, outputs: str, inputs: str) -> Linear:
            dtype = placement.dtype_of(f"attention.{name}")
            return Linear(outputs, inputs, config, placement, rngs, dtype)

        self.q = linear("q", "NH", "D")
        self.k = linear("k", "KH", "D")
        self.v = linear("v", "KH", "D")
        self.o = linear("o", "D", "NH")
        self.window = config.sliding_window

    def full(
        self,
        x: RowHidden,
        rotary: Rotary,
        capture: Capture = NOTHING,
        *,
        segments: Segments | None = None,
        adapter: BlockAdapter = UNCHANGED,
    ) -> RowHidden:
        """Causal attention within each row, or each segment of it: x [B T D] -> [B T D]."""
        capture.record("attention.qkv", x)
        with jax.named_scope("qkv"):
            q, k = self.q.full(x, adapter.q), self.k.full(x, adapter.k)
            v = self.v.full(x, adapter.v)
        q, k = rotary.rotate(q), rotary.rotate(k)
        capture.record("attention.q", q)
        capture.record("attention.k", k)
        with jax.named_scope("attend"):
            mixed = self.kernels.full_attention(q, k, v, self.window, self.layout, segments)
        capture.record("attention.o", mixed)
        with jax.named_scope("output"):
            return self.o.full(mixed, adapter.o)

    def paged(
        self,
        x: FlatHidden,
        rotary: Rotary,
        pages: Pages,
        batch: RaggedBatch,
        adapters: Adapters = NO_ADAPTERS,
    ) -> tuple[FlatHidden, Pages]:
        """Writes the new keys and values, then attends: x [T D] -> [T D] and the pages."""
        stacks, slots = adapters
        beside = (stacks.q, stacks.k, stacks.v)
        with jax.named_scope("qkv"):
            q, k, v = paged_together(x, self.q, self.k, self.v, stacks=beside, slots=slots)
        q, k = rotary.rotate(q), rotary.rotate(k)
        with jax.named_scope("attend"):
            mixed, pages = self.kernels.attend(q, k, v, pages, batch, self.window)
        with jax.named_scope("output"):
            out = self.o.paged(mixed, stacks.o, slots)
            return out if self.layout is None else self.layout.sum_over(out, "N"), pages
