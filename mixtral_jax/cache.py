"""Pages of keys and values, and the ragged batch that reads them: the only file that knows pages.

The cache is, per layer, one array of pages [P Y C H]: P pages of Y tokens, each token with its
C = 2K heads, key and value of each head next to one another (k0 v0 k1 v1 ...). A sequence owns any
pages in any order; its row of the page table lists them. This, and `RaggedBatch`, is the layout of
JAX's TPU kernel `ragged_paged_attention`.

Pages of int8 take about a quarter of float32's memory: each head's H values are rounded to
int8 with a scale of their own, whose four bytes (float32) stand behind them: [P Y C H+4].

Pages of fp8 (float8_e4m3fn: four bits of exponent, three of mantissa) are [P Y C H] without scales,
as if every scale were 1: each value is rounded by itself, and what exceeds 448 becomes 448.

Every maker of kernels but one takes these forms; the small numbers of a TPU are in words of their
own (kernels/tpu/word_pages.py). `Placement.page_form` says which form a model has.

Worked example: page size 4, three sequences. Two are in decode, with 5 and 9 tokens cached after
this step, and one brings a prompt chunk of 3 tokens after 4 that are already cached:

    tokens          [a b  c d e  . . .]       8 places, 5 in use
    positions       [4 8  4 5 6  . . .]
    lengths         [5 9 7]                   cached positions, the new ones included
    query_starts    [0 1 2 5]                 sequence s has the tokens query_starts[s] .. [s+1]
    page_table      [[7 2 .] [0 3 5] [1 4 .]]
    num_decodes     2                         sequences of one token come first
    num_sequences   3

Token d (position 5) goes to page_table[2][5 // 4] = page 4, place 5 % 4 = 1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mixtral_jax.axes import FlatKeys, FlatTokens, Lengths, Pages, PageTable, QueryStarts, Scalar
from mixtral_jax.config import ModelConfig
from mixtral_jax.weight import round_rows

_SCALE_BYTES = 4


class RaggedBatch(NamedTuple):
    """One flat row of T new tokens of up to S sequences; all i32. See the module's example."""

    tokens: FlatTokens
    positions: FlatTokens
    lengths: Lengths
    query_starts: QueryStarts
    page_table: PageTable  # [S W]
    num_decodes: Scalar
    num_sequences: Scalar

    @property
    def num_tokens(self) -> Scalar:
        """Number of places that hold a token: those of all sequences, which come first."""
        return self.query_starts[self.num_sequences]

    def sequence_of_token(self) -> FlatTokens:
        """The number of each token's sequence; unspecified for unused places."""
        place = jnp.arange(self.tokens.shape[0], dtype=jnp.int32)
        ends = jnp.where(
            jnp.arange(self.lengths.shape[0]) < self.num_sequences,
            self.query_starts[1:],
            self.tokens.shape[0],
        )
        sequence = jnp.searchsorted(ends, place, side="right")
        return jnp.minimum(sequence, self.lengths.shape[0] - 1).astype(jnp.int32)

    def seen_by_decodes(self, window: int | None) -> tuple[Lengths, Lengths]:
        """The range of positions that the token of each decode attends to: [S] and [S].

        The begin may be negative. The end, which is not in the range, is 0 for sequences that
        bring more than one token.
        """
        rows = self.lengths.shape[0]
        is_decode = jnp.arange(rows, dtype=jnp.int32) < self.num_decodes
        lengths = jnp.where(is_decode, self.lengths, 0)
        return jnp.zeros_like(lengths) if window is None else lengths - window, lengths


class PageForm(NamedTuple):
    """One page of one layer on one device: letters of its axes, as in "YKH", sizes and dtype."""

    axes: str
    shape: tuple[int, ...]
    dtype: jnp.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the page."""
        return math.prod(self.shape) * self.dtype.itemsize


def page_form(page_size: int, kv_heads: int, head_size: int, dtype: DTypeLike) -> PageForm:
    """The form that this module reads and writes, of the key/value heads of one device."""
    places = head_size + (_SCALE_BYTES if jnp.dtype(dtype) == jnp.int8 else 0)
    return PageForm("YKH", (page_size, 2 * kv_heads, places), jnp.dtype(dtype))


class PagedCache(NamedTuple):
    """The pages of every layer. Donate it to the step that writes it."""

    layers: tuple[Pages, ...]

    @classmethod
    def empty(
        cls, config: ModelConfig, num_pages: int, page_size: int, dtype: DTypeLike
    ) -> "PagedCache":
        """Makes pages of zeros for every layer."""
        page = page_form(page_size, config.num_kv_heads, config.head_size, dtype)
        shape = (num_pages, *page.shape)
        return cls(tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)))

    @property
    def num_pages(self) -> int:
        """Number P of pages of a layer."""
        return self.layers[0].shape[0]

    @property
    def page_size(self) -> int:
        """Number Y of tokens of a page."""
        return self.layers[0].shape[1]


def write(pages: Pages, k: FlatKeys, v: FlatKeys, batch: RaggedBatch) -> Pages:
    """Puts the keys and values of the batch's tokens where the page table says."""
    num_pages, page_size = pages.shape[:2]
    page, place = places_of(batch, page_size, num_pages)
    heads = jnp.stack([k, v], axis=2).reshape(k.shape[0], -1, k.shape[-1])
    rounded = round_heads(heads, pages.dtype)
    return pages.at[page, place].set(rounded, mode="drop")


def places_of(batch: RaggedBatch, page_size: int, num_pages: int) -> tuple[FlatTokens, FlatTokens]:
    """The page of each new token, and its place there; `num_pages` for places without a token.

    A page out of range is dropped by a scatter.
    """
    sequence = batch.sequence_of_token()
    page = batch.page_table[sequence, batch.positions // page_size]
    in_use = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32) < batch.num_tokens
    return jnp.where(in_use, page, num_pages), batch.positions % page_size


def round_heads(heads: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rounds heads [T C H] as pages of `dtype` hold them: [T C H], of int8 [T C H+4]."""
    if dtype == jnp.float8_e4m3fn:
        # A cast gives NaN for what is larger; NaN itself stays.
        largest = float(jnp.finfo(dtype).max)
        return jnp.clip(heads, -largest, largest).astype(dtype)
    if dtype != jnp.int8:
        return heads.astype(dtype)
    values, scale = round_rows(heads)
    scale_bytes = jax.lax.bitcast_convert_type(scale, jnp.int8)
    return jnp.concatenate([values, scale_bytes], axis=-1)


def read(pages: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Some pages' heads as values: [... C H], or int8 [... C H+4], -> [... C H] of `dtype`."""
    if pages.dtype != jnp.int8:
        return pages.astype(dtype)
    scale = jax.lax.bitcast_convert_type(pages[..., -_SCALE_BYTES:], jnp.float32)
    return (pages[..., :-_SCALE_BYTES].astype(jnp.float32) * scale[..., None]).astype(dtype)
