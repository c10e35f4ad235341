"""Batch: rows of packed documents, and for each position the token that comes next."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.training.example import Example


class Batch(NamedTuple):
    """B rows of T positions. Arrays of the host (numpy), or of the devices."""

    tokens: Any  # [B T] i32
    targets: Any  # [B T] i32, the token behind each position in its document
    weights: Any  # [B T] f32, what the loss of that target counts; 0 where there is none
    segments: Any  # [B T] i32, the number of each position's document; 0 is padding

    @classmethod
    def packed(cls, rows: Sequence[Sequence[Example]], length: int) -> "Batch":
        """Puts the documents of each row one behind the other, and fills up with padding.

        The documents of a row must fit: together they have at most `length` ids.
        """
        batch = cls(
            tokens=np.zeros((len(rows), length), np.int32),
            targets=np.zeros((len(rows), length), np.int32),
            weights=np.zeros((len(rows), length), np.float32),
            segments=np.zeros((len(rows), length), np.int32),
        )
        for row, examples in enumerate(rows):
            start = 0
            for number, example in enumerate(examples, 1):
                stop = start + len(example.ids)
                assert stop <= length, "the documents of a row are longer than the row"
                batch.tokens[row, start:stop] = example.ids
                batch.targets[row, start : stop - 1] = example.ids[1:]
                batch.weights[row, start : stop - 1] = example.weights[1:]
                batch.segments[row, start:stop] = number
                start = stop
        return batch


class PreferenceBatch(NamedTuple):
    """Pairs of answers to the same prompts: B rows of those preferred, B rows of the others.

    Each row holds one document, the prompt and an answer, whose weights are those of the answer.
    """

    chosen: Batch
    rejected: Batch

    @property
    def rows(self) -> Batch:
        """All 2B rows, the preferred ones first; arrays of the devices."""
        joined: Batch = jax.tree.map(
            lambda chosen, rejected: jnp.concatenate([chosen, rejected]),
            self.chosen,
            self.rejected,
        )
        return joined
