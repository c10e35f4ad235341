"""Small runs: a model, rows of arithmetic sequences, and settings for them."""

from dataclasses import replace
from typing import Any

import numpy as np

from mixtral_jax.config import ModelConfig
from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.training.batch import Batch
from mixtral_jax.training.config import TrainingConfig
from mixtral_jax.training.example import Example
from tests.support import sources

DENSE = replace(from_hf(sources.DENSE), num_layers=1)
MOE = replace(from_hf(sources.MOE), num_layers=2)
LENGTH = 16


def settings(**changes: Any) -> TrainingConfig:
    """Settings of a short run; every change is a field of TrainingConfig."""
    plain: dict[str, Any] = dict(
        adapter=AdapterConfig(rank=3), steps=20, rows=4, length=LENGTH, learning_rate=1e-2
    )
    return TrainingConfig(**plain | changes)


class Counting:
    """Rows of documents that count up: two in each row, of which the second half is learnt.

    After `num_steps` the rows come again.
    """

    def __init__(
        self, config: ModelConfig, rows: int, length: int = LENGTH, num_steps: int = 1000
    ) -> None:
        self.vocab_size, self.rows, self.length = config.vocab_size, rows, length
        self.num_steps = num_steps

    def example(self, seed: int) -> Example:
        """A document of 3 to length/2 ids that goes up by 1 or 2."""
        random = np.random.default_rng(seed)
        size = random.integers(3, self.length // 2 + 1)
        ids = (
            random.integers(self.vocab_size) + np.arange(size) * random.integers(1, 3)
        ) % self.vocab_size
        weights = (np.arange(size) >= size // 2).astype(np.float32)
        return Example(ids.astype(np.int32), weights)

    def batch(self, step: int) -> Batch:
        """The rows of a step."""
        first = 2 * self.rows * (step % self.num_steps)
        rows = [
            [self.example(first + 2 * i), self.example(first + 2 * i + 1)] for i in range(self.rows)
        ]
        return Batch.packed(rows, self.length)
