"""Blocks of GGUF's quantised types as our weights in groups keep them.

    int4     groups of 32 inputs with scale and minimum
      Q4_0   32 weights: d f16, 16 bytes           (q - 8) * d
      Q4_1   32 weights: d and m f16, 16 bytes     q * d + m
      Q4_K   256 weights: d and dmin f16, 12 bytes with 6 bits of a scale and of a minimum for each
             32 weights, 128 bytes                 q * (d * scale) - dmin * minimum
    int8x16  groups of 16 inputs with a scale
      Q8_0   32 weights: d f16, 32 bytes           q * d
      Q6_K   256 weights: 128 bytes with four bits of each, 64 with two, a scale of eight bits for
             each 16 weights, d f16                (q - 32) * (d * scale)

The halves of 16 bytes hold weights j and j + 16, those of Q4_K's 32 bytes j and j + 32. Scales and
minima are float16 in the file and here, but for the product 8 d, which is exact, and those of Q4_K
and Q6_K: products of numbers of 11 bits and of 6 or 8, which are rounded to float16.
(github.com/ggml-org/ggml, src/ggml-common.h; the package gguf decodes the same to floats)
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from mixtral_jax.weight import INT8_GROUPS


class _Type(NamedTuple):
    """One type of blocks."""

    nbytes: int
    head: int  # bytes before those with weights
    stride: int  # weights between those of the two halves of a byte
    # (heads u8 [B head]) -> scale and minimum f16 of each 32 weights
    pairs: Callable[[np.ndarray], np.ndarray]


def kept_dtype(encoding: str) -> str | None:
    """The dtype of ours that keeps a type of GGUF, if there is one."""
    if encoding in _TYPES:
        return "int4"
    return INT8_GROUPS if encoding in ("Q8_0", "Q6_K") else None


def halves(raw: np.ndarray, encoding: str) -> np.ndarray:
    """The numbers of rows of blocks u8 [R _] of four bits, two in a byte: [R I/2]."""
    kind = _TYPES[encoding]
    octets = raw.reshape(-1, kind.nbytes)[:, kind.head :].reshape(-1, kind.stride)
    codes = np.concatenate([octets & 15, octets >> 4], axis=1)  # in the order of the inputs
    return (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(len(raw), -1)


def pairs(raw: np.ndarray, encoding: str) -> np.ndarray:
    """Scale and minimum of the groups of rows of such blocks u8 [R _]: f16 [R I/32 2]."""
    kind = _TYPES[encoding]
    heads = raw.reshape(-1, kind.nbytes)[:, : kind.head]
    with np.errstate(over="ignore"):  # the writer refuses what is not finite
        return kind.pairs(np.ascontiguousarray(heads)).reshape(len(raw), -1, 2)


def values(raw: np.ndarray, encoding: str) -> np.ndarray:
    """The numbers of rows of blocks u8 [R _] of Q8_0 or Q6_K: i8 [R I]."""
    if encoding == "Q8_0":
        return raw.reshape(-1, 34)[:, 2:].view(np.int8).reshape(len(raw), -1)
    blocks = raw.reshape(-1, 210)
    # Halves of 64 bytes hold weights j and j + 64 of 128; pairs of bits of 32 bytes j, j + 32 ...
    low, high = blocks[:, :128].reshape(-1, 1, 64), blocks[:, 128:192].reshape(-1, 1, 32)
    fours = np.concatenate([low & 15, low >> 4], axis=1).reshape(-1, 4, 32)
    twos = high >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return (fours | twos << 4).view(np.int8).reshape(len(raw), -1) - np.int8(32)


def scales(raw: np.ndarray, encoding: str) -> np.ndarray:
    """The scales of groups of 16 of rows of such blocks u8 [R _]: f16 [R I/16]."""
    if encoding == "Q8_0":
        own = np.ascontiguousarray(raw.reshape(-1, 34)[:, :2]).view("<f2")
        return np.repeat(own, 2, axis=1).reshape(len(raw), -1)
    blocks = raw.reshape(-1, 210)
    factor = np.ascontiguousarray(blocks[:, 208:]).view("<f2").astype(np.float32)
    own = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8) * factor
    with np.errstate(over="ignore"):  # the writer refuses what is not finite
        return own.astype(np.float16).reshape(len(raw), -1)


def _of_q4_0(heads: np.ndarray) -> np.ndarray:
    scale = heads.view("<f2")
    return np.stack([scale, np.float16(-8) * scale], axis=-1)


def _of_q4_1(heads: np.ndarray) -> np.ndarray:
    return heads.view("<f2")


def _of_q4_k(heads: np.ndarray) -> np.ndarray:
    factors = heads[:, :4].copy().view("<f2").astype(np.float32)
    first, second, third = heads[:, 4:8], heads[:, 8:12], heads[:, 12:16]
    # Four scales, then four minima, of six bits; the later ones have their two high bits in these.
    scale = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minimum = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return np.stack([factors[:, :1] * scale, -factors[:, 1:] * minimum], axis=-1).astype(np.float16)


_TYPES: Mapping[str, _Type] = MappingProxyType(
    {
        "Q4_0": _Type(18, head=2, stride=16, pairs=_of_q4_0),
        "Q4_1": _Type(20, head=4, stride=16, pairs=_of_q4_1),
        "Q4_K": _Type(144, head=16, stride=32, pairs=_of_q4_k),
    }
)
