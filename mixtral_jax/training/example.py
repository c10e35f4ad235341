"""Example: the token ids of one document, and how much each of them counts as a target."""

from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    """One document of a data set, as the model reads it.

    `weights[i]` is what the loss of predicting `ids[i]` from the ids before it counts: 0 for what
    the model only reads, 1 for what it learns to write. `weights[0]` is always 0.
    """

    ids: np.ndarray  # [T] i32
    weights: np.ndarray  # [T] f32

    @property
    def num_targets(self) -> int:
        """Number of ids that count."""
        return int(np.count_nonzero(self.weights))
