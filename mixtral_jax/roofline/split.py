"""Splits: the ways in which a number of chips can share one model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.sharding import MESH_AXES, ShardingRules, copies_of


@dataclass(frozen=True, kw_only=True)
class Split:
    """One way to split a model over chips: the sizes of the mesh axes, and the form of attention.

    Attributes:
        data: groups of chips that hold the whole model each and serve different sequences.
        expert: chips that share the experts.
        tensor: chips that share heads, feed-forward channels and the vocabulary.
        copies: chips within `tensor` that hold the same key/value heads.
        dp_attention: sequences, not heads, are split over `expert`.
    """

    data: int
    expert: int
    tensor: int
    copies: int
    dp_attention: bool

    @classmethod
    def of(
        cls, model: ModelConfig, data: int, expert: int, tensor: int, dp_attention: bool = False
    ) -> "Split":
        """The split of a model with these sizes, and as many copies of key/value heads as needed.

        Raises ConfigError if the model cannot be split so.
        """
        copies = copies_of(model, expert, tensor, dp_attention)
        split = cls(
            data=data, expert=expert, tensor=tensor, copies=copies, dp_attention=dp_attention
        )
        ShardingRules.of(model, split.mesh, dp_attention).check(model, split.mesh)
        return split

    @property
    def chips(self) -> int:
        """Number of chips."""
        return self.data * self.expert * self.tensor

    @property
    def axis_sizes(self) -> tuple[int, int, int, int]:
        """Sizes of the mesh axes, in the order of MESH_AXES."""
        return self.data, self.expert, self.tensor // self.copies, self.copies

    @property
    def mesh(self) -> Mesh:
        """A mesh of numbers in place of devices, because ShardingRules read its sizes only."""
        return Mesh(np.arange(self.chips).reshape(self.axis_sizes), MESH_AXES)

    def __str__(self) -> str:
        return f"data={self.data},expert={self.expert},tensor={self.tensor}"


def candidates(model: ModelConfig, batch: int, chips: int) -> list[Split]:
    """All splits of a model over a number of chips that give each group at least one sequence.

    Splits that place every array alike are listed once. The list is empty where there is none.
    """
    splits: dict[Any, Split] = {}
    for expert in _divisors(chips):
        for tensor in _divisors(chips // expert):
            for dp_attention in (False, True):
                try:
                    split = Split.of(model, chips // expert // tensor, expert, tensor, dp_attention)
                except ConfigError:
                    continue
                rules = ShardingRules.of(model, split.mesh, dp_attention)
                if rules.ways("B", split.mesh) > batch:
                    continue
                shape = split.mesh.shape
                axes_of_letters = {
                    letter: tuple(
                        (axis, shape[axis]) for axis in getattr(rules, letter) if shape[axis] > 1
                    )
                    for letter in "BEFKNPV"
                }
                splits.setdefault(str((split.axis_sizes, axes_of_letters)), split)
    return list(splits.values())


def _divisors(number: int) -> Iterator[int]:
    return (size for size in range(1, number + 1) if number % size == 0)
