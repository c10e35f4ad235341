"""ShardingRules: which mesh axis each axis letter is split over. Parallelism is decided here only.

A mesh has the axes `data` (rows of the batch), `expert` (experts) and `tensor` (heads, feed-forward
and vocabulary). The compiler inserts the collectives for everything but the experts, whose exchange
`moe.py` writes out with `shard_map`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mixtral_jax.config import ConfigError, ModelConfig

MESH_AXES = ("data", "expert", "tensor")


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Axis letter -> mesh axis. Letters that are not named here are never split."""

    B: str | None = "data"
    E: str | None = "expert"
    F: str | None = "tensor"
    K: str | None = "tensor"
    N: str | None = "tensor"
    V: str | None = "tensor"

    def spec(self, axes: str) -> PartitionSpec:
        """PartitionSpec of an array whose dimensions are the letters of `axes`, e.g. "EFD".

        Raises ValueError where two dimensions would be split over one mesh axis.
        """
        names = [getattr(self, letter, None) for letter in axes]
        split = [name for name in names if name is not None]
        if len(split) != len(set(split)):
            raise ValueError(f"{axes!r} would split two dimensions over one mesh axis: {names}")
        return PartitionSpec(*names)

    def sharding(self, axes: str, mesh: Mesh) -> NamedSharding:
        return NamedSharding(mesh, self.spec(axes))

    def check(self, config: ModelConfig, mesh: Mesh) -> None:
        """Raises ConfigError if a dimension of the model cannot be split evenly over the mesh."""
        for field in fields(self):
            size = config.axis_sizes.get(field.name)
            axis = getattr(self, field.name)
            if not size or axis is None:
                continue
            if size % mesh.shape[axis]:
                raise ConfigError(
                    f"axis {field.name} of size {size} cannot be split {mesh.shape[axis]} ways "
                    f"over mesh axis {axis!r}; choose a divisor of {size}"
                )


def make_mesh(
    data: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Mesh with the axes (data, expert, tensor) over the first data * expert * tensor devices.

    Raises ValueError if there are fewer devices than that.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = data * expert * tensor
    if count > len(devices):
        raise ValueError(
            f"a mesh of data={data} x expert={expert} x tensor={tensor} needs {count} devices, "
            f"there are {len(devices)}"
        )
    # Auto: the compiler propagates shardings; jax's default, Explicit, would put them into types.
    return jax.make_mesh(
        (data, expert, tensor),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices[:count],
    )
