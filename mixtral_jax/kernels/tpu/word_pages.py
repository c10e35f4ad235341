"""Pages of int8 and fp8 as a TPU reads them: four values in a word of 32 bits.

A TPU moves tiles of 8 rows of 128 words, and writes a row of them in place; rows of fewer bits it
packs, and a scatter into them copies all pages. So a page of Y tokens of one layer is int32
[R Y' H], with heads of H = 128 values, and each word holds one value of four heads:

    four heads on a device and more     R = C / 4, row y is token y, word r has heads 4r .. 4r+3
    two (one key, one value)            R = 1, row y < Y / 2 has both heads of token y and both of
                                        token y + Y / 2

    bits 0-7 k0, bits 8-15 v0, bits 16-23 k1, bits 24-31 v1

fp8 is the bits of float8_e4m3fn. int8 has a scale for each token's head, which eight bits hold: the
top of a float32 (five bits of exponent from 2^-24 on, three of mantissa), rounded up. Behind the
rows of values follow eight more, a tile, the first of which has at place l the scales of row l,
each in the bits of its value. So int8 takes 9/16 to 17/32 of bfloat16's memory, and fp8 half.

Tokens of one step may share a word and share a row of scales. Therefore all are written by adding
differences: what was there is read, and integers that change different bits add up to any change.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int32

from mixtral_jax.axes import FlatKeys, FlatTokens, WordPages
from mixtral_jax.cache import PageForm, RaggedBatch, places_of, round_heads
from mixtral_jax.errors import ConfigError
from mixtral_jax.kernels.tpu.tiles import LANES
from mixtral_jax.weight import round_by

_TILE_ROWS = 8
_SLOTS = 4
_MANTISSA = 20  # bits of a float32 behind those that a scale keeps
_FIRST = (127 - 24) << 3  # the top bits of 2^-24


def page_form(page_size: int, kv_heads: int, head_size: int, dtype: DTypeLike) -> PageForm:
    """A page of `dtype`, int8 or float8_e4m3fn, of the key/value heads of one device.

    Raises ConfigError for sizes that a TPU's tiles do not fit.
    """
    heads = 2 * kv_heads
    if head_size != LANES or page_size != LANES or (heads > 2 and heads % _SLOTS):
        other = "choose another --mesh" if page_size == LANES else f"give --page-size {LANES}"
        raise ConfigError(
            f"keys and values of {jnp.dtype(dtype).name} on tpu are for pages of {LANES} tokens, "
            f"heads of {LANES} values and one or an even number of key/value heads on each device; "
            f"these are {kv_heads} of {head_size} in pages of {page_size}: leave --kv-dtype out, "
            f"or {other}"
        )
    words, rows = (heads // _SLOTS, page_size) if heads > 2 else (1, page_size // 2)
    more = _TILE_ROWS if jnp.dtype(dtype) == jnp.int8 else 0
    return PageForm("KYH", (words, rows + more, head_size), jnp.dtype(jnp.int32))


class WordSizes(NamedTuple):
    """Sizes of pages in words: R words of a row, its tokens, rows of values; with scales or not."""

    words: int
    tokens_of_word: int
    rows: int
    has_scales: bool

    @classmethod
    def of(cls, pages: jax.Array, kv_heads: int) -> "WordSizes":
        """The sizes of pages [P R Y' H] of so many key/value heads."""
        per_word = 2 if kv_heads == 1 else 1
        rows = LANES // per_word
        return cls(pages.shape[1], per_word, rows, pages.shape[2] > rows)

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.rows * self.tokens_of_word


def write(pages: WordPages, k: FlatKeys, v: FlatKeys, batch: RaggedBatch) -> WordPages:
    """`cache.write` into such pages."""
    form = WordSizes.of(pages, k.shape[1])
    page, place = places_of(batch, form.page_size, len(pages))
    row, half = place % form.rows, place // form.rows
    heads = jnp.stack([k, v], axis=2).reshape(k.shape[0], -1, k.shape[-1])
    if form.has_scales:
        code = scale_code(jnp.max(jnp.abs(heads.astype(jnp.float32)), axis=-1) / 127)
        bits = round_by(heads, scale_of(code)).astype(jnp.int32) & 255
        lane = jnp.arange(LANES, dtype=jnp.int32)
        is_mine = lane[None, None] == row[:, None, None]
        scales, bits_of_scales = (
            jnp.where(is_mine, x, 0) for x in _words(code[..., None], half, form)
        )
        rows = jnp.concatenate([row, jnp.full_like(row, form.rows)])
        page = jnp.concatenate([page, page])
    else:
        rounded = round_heads(heads, jnp.float8_e4m3fn)
        bits = jax.lax.bitcast_convert_type(rounded, jnp.uint8).astype(jnp.int32)
        rows = row
    words, changed = _words(bits, half, form)
    if form.has_scales:
        words = jnp.concatenate([words, scales])
        changed = jnp.concatenate([changed, bits_of_scales])
    old = pages.at[page, :, rows].get(mode="clip")
    difference = ((old & ~changed) | words) - old
    return pages.at[page, :, rows].add(difference, mode="drop")


def _words(bits: jax.Array, half: FlatTokens, form: WordSizes) -> tuple[jax.Array, jax.Array]:
    """Puts bytes [T C H] (i32, 0 .. 255) into words [T R H]; which bits of them are the token's."""
    tokens, _, size = bits.shape
    slot = jnp.arange(_SLOTS, dtype=jnp.int32)
    if form.tokens_of_word == 2:
        bits = jnp.tile(bits, (1, 2, 1))
        is_mine = (slot // 2)[None] == half[:, None]
    else:
        is_mine = jnp.ones((tokens, _SLOTS), bool)
    split = bits.reshape(tokens, form.words, _SLOTS, size)
    changed = jnp.sum(jnp.where(is_mine, (255 << (8 * slot))[None], 0), axis=1, dtype=jnp.int32)
    words = jnp.sum(split << (8 * slot)[None, None, :, None], axis=2, dtype=jnp.int32)
    changed = jnp.broadcast_to(changed[:, None, None], words.shape)
    return words & changed, changed


def scale_code(scale: Float32[jax.Array, "*T"]) -> Int32[jax.Array, "*T"]:
    """The eight bits of a scale that is at least as large, 0 .. 255; 2^-24 to 240."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    up = (bits + ((1 << _MANTISSA) - 1)) >> _MANTISSA
    return jnp.clip(up - _FIRST, 0, 255)


def scale_of(code: Int32[jax.Array, "*T"]) -> Float32[jax.Array, "*T"]:
    """The scale that eight bits mean."""
    return jax.lax.bitcast_convert_type((code + _FIRST) << _MANTISSA, jnp.float32)


def fp8_of(bits: Int32[jax.Array, "*T"]) -> Float32[jax.Array, "*T"]:
    """The values of the bits of float8_e4m3fn, in operations that every TPU has; no NaN is one."""
    rest = bits & 127
    normal = jax.lax.bitcast_convert_type((rest << _MANTISSA) + (120 << 23), jnp.float32)
    value = jnp.where(rest < 8, rest.astype(jnp.float32) * 2.0**-9, normal)
    return jnp.where(bits > 127, -value, value)


def slot_of(words: Int32[jax.Array, "*T"], slot: int) -> Int32[jax.Array, "*T"]:
    """The eight bits of one slot, 0 .. 255."""
    return jax.lax.shift_right_logical(words, jnp.int32(8 * slot)) & 255


def signed_slot_of(words: Int32[jax.Array, "*T"], slot: int) -> Int32[jax.Array, "*T"]:
    """The eight bits of one slot as a signed number."""
    return (words << (24 - 8 * slot)) >> 24


def read(pages: WordPages, kv_heads: int) -> Float[jax.Array, "P Y C H"]:
    """All heads of all pages in float32, as `cache` lays them out: what the kernel computes with.

    It is written for clarity and reads everything: tests hold the kernel to it.
    """
    form = WordSizes.of(pages, kv_heads)
    values = pages[:, :, : form.rows]
    slots = []
    for slot in range(_SLOTS):
        if form.has_scales:
            scale = scale_of(slot_of(pages[:, :, form.rows, : form.rows], slot))
            slots.append(signed_slot_of(values, slot).astype(jnp.float32) * scale[..., None])
        else:
            slots.append(fp8_of(slot_of(values, slot)))
    if form.tokens_of_word == 2:
        halves = [jnp.stack(slots[i : i + 2], axis=-2) for i in (0, 2)]  # [P 1 rows 2 H]
        return jnp.concatenate(halves, axis=2)[:, 0]
    heads = jnp.stack(slots, axis=-2)  # [P R Y 4 H]
    heads = jnp.swapaxes(heads, 1, 2)
    return heads.reshape(*heads.shape[:2], -1, heads.shape[-1])
