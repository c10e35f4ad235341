"""Layout: a mesh with a model's rules on it, and the collectives of a serving step.

Inside the step's `shard_map` an array's first dimension is the flat tokens, of which each device
holds those of its part of `B`. The model writes out every collective by the methods here, so that
nothing but activations can ever travel.
"""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding

from mixtral_jax.sharding import MESH_AXES, MeshAxes, ShardingRules


@dataclass(frozen=True)
class Layout:
    """A mesh and a model's sharding rules on it."""

    mesh: Mesh
    rules: ShardingRules

    @property
    def num_sequence_groups(self) -> int:
        """Number of groups of sequences, each with pages of its own."""
        return self.rules.ways("B", self.mesh)

    def sharding(self, axes: str) -> NamedSharding:
        """The sharding of an array whose dimensions are the letters of `axes`."""
        return self.rules.sharding(axes, self.mesh)

    def axes(self, letters: str) -> MeshAxes:
        """Mesh axes, of more than one device, that any of the letters is split over."""
        names = {axis for letter in letters for axis in getattr(self.rules, letter)}
        return tuple(axis for axis in MESH_AXES if axis in names and self.mesh.shape[axis] > 1)

    def part_index(self, letter: str) -> jax.Array | int:
        """The number of the part of a split dimension that this device holds, counted from 0."""
        axes = self.axes(letter)
        return jax.lax.axis_index(axes) if axes else 0

    def axes_shared_with_tokens(self, letters: str) -> MeshAxes:
        """Mesh axes that split both the tokens and one of the letters."""
        rows = self.axes("B")
        return tuple(axis for axis in self.axes(letters) if axis in rows)

    def gather_tokens(self, x: jax.Array, letters: str) -> jax.Array:
        """Gathers the tokens of devices with other parts of the letters: [T ...] -> [T' ...]."""
        axes = self.axes_shared_with_tokens(letters)
        return jax.lax.all_gather(x, axes, tiled=True) if axes else x

    def sum_over(self, x: jax.Array, letters: str) -> jax.Array:
        """Sums over the devices' parts of the letters: the inverse of `gather_tokens`."""
        if shared := self.axes_shared_with_tokens(letters):
            x = jax.lax.psum_scatter(x, shared, tiled=True)
        rest = tuple(axis for axis in self.axes(letters) if axis not in shared)
        return jax.lax.psum(x, rest) if rest else x

    def gather_dimension(self, x: jax.Array, letter: str, dimension: int) -> jax.Array:
        """Returns x with its dimension `letter` complete on every device (all-gather)."""
        axes = self.axes(letter)
        return jax.lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x
