"""Matrices as PEFT stores them and as an Adapter holds them: experts, halves and ranks.

PEFT's are flat, A [U I] and B [O U]; ours have the axes of the model (`adapter_letters`).
"""

from collections.abc import Iterator

import numpy as np

from mixtral_jax.checkpoint.peft_names import Place
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.adapter import FEED_FORWARD, LowRank, adapter_letters

Pair = tuple[np.ndarray, np.ndarray]


def split(pair: Pair, place: Place) -> list[Pair]:
    """Returns the matrices of each of a place's targets, with the experts first if it has all.

    The pair is PEFT's: A [E*U I] with the experts slowest, B [O U*E] with the experts fastest.
    """
    a, b = pair
    if place.experts:
        a = a.reshape(place.experts, -1, place.inputs)
        b = b.reshape(place.outputs, -1, place.experts).transpose(2, 0, 1)
    if len(place.targets) == 1:
        return [(a, b)]
    gate, up = np.split(b, 2, axis=1)
    half = a.shape[1] // 2
    is_apart = a.shape[1] % 2 == 0 and not gate[:, :, half:].any() and not up[:, :, :half].any()
    if is_apart:  # two adapters were put together, as PEFT does with experts stored one by one
        return [(a[:, :half], gate[:, :, :half]), (a[:, half:], up[:, :, half:])]
    return [(a, gate), (a, up)]


def joined(config: ModelConfig, target: str, pairs: list[Pair]) -> LowRank:
    """Makes a layer's LowRank of what was read of it: one pair, or one for each expert."""
    if pairs[0][0].ndim == 2 and adapter_letters(target, config)[0].startswith("E"):
        rank = max(len(a) for a, _ in pairs)
        grown = [padded(a, b, rank) for a, b in pairs]
        a, b = (np.stack(arrays) for arrays in zip(*grown, strict=True))
    else:
        (a, b), *_ = pairs
    sizes = config.axis_sizes | {"U": b.shape[-1]}
    letters = adapter_letters(target, config)
    shaped = [
        np.ascontiguousarray(array.reshape([sizes[letter] for letter in axes]))
        for array, axes in zip((a, b), letters, strict=True)
    ]
    return LowRank(*shaped)  # type: ignore[arg-type]


def padded(a: np.ndarray, b: np.ndarray, rank: int) -> Pair:
    """Adds zeros to matrices [U I] and [O U] up to a rank."""
    rest = rank - len(a)
    if not rest:
        return a, b
    return np.pad(a, ((0, rest), (0, 0))), np.pad(b, ((0, 0), (0, rest)))


def is_of_experts(target: str, low: LowRank) -> bool:
    """Says whether a target's matrices have experts as their first axis."""
    return target in FEED_FORWARD and low.a.ndim == 3


def zeros(low: LowRank) -> LowRank:
    """Makes matrices of zeros in the shapes of others."""
    return LowRank(*(np.zeros(array.shape, np.float32) for array in low))  # type: ignore[arg-type]


def swapped_zeros(low: LowRank) -> LowRank:
    """Makes zeros for `down` in the sizes of a gate or up of experts: A [E U D], B [E F U]."""
    (experts, rank, width), hidden = low.a.shape, low.b.shape[1]
    a, b = np.zeros((experts, rank, hidden), np.float32), np.zeros((experts, width, rank))
    return LowRank(a, b.astype(np.float32))  # type: ignore[arg-type]


def matrices(target: str, low: LowRank, rank: int) -> Iterator[Pair]:
    """Yields the matrices [U I] and [O U] of each expert, or the pair of a weight without."""
    a, b = (np.asarray(array, np.float32) for array in low)
    experts = a.shape[0] if is_of_experts(target, low) else 1
    own = b.shape[-1]
    pairs = zip(a.reshape(experts, own, -1), b.reshape(experts, -1, own), strict=True)
    for pair in pairs:
        yield tuple(np.ascontiguousarray(array) for array in padded(*pair, rank))  # type: ignore[misc]
