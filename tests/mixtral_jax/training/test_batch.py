"""Documents of a row stand one behind the other, and no target crosses from one to the next."""

import numpy as np

from mixtral_jax.training.batch import Batch
from mixtral_jax.training.example import Example


def test_two_documents_and_padding() -> None:
    first = Example(np.array([1, 5, 6], np.int32), np.array([0, 0, 1], np.float32))
    second = Example(np.array([1, 7], np.int32), np.array([0, 0.5], np.float32))
    batch = Batch.packed([[first, second]], length=7)
    np.testing.assert_array_equal(batch.tokens, [[1, 5, 6, 1, 7, 0, 0]])
    np.testing.assert_array_equal(batch.targets, [[5, 6, 0, 7, 0, 0, 0]])
    np.testing.assert_array_equal(batch.weights, [[0, 1, 0, 0.5, 0, 0, 0]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 2, 2, 0, 0]])
