"""ShardingRules: which mesh axes each axis letter is split over. Parallelism is decided here only.

A mesh has the axes

    data    sequences: their tokens and their pages
    expert  experts; and heads and vocabulary, as far as attention is split by heads
    tensor  heads, feed-forward and vocabulary
    copy    query heads, feed-forward and vocabulary, as `tensor` does; devices along it hold the
            same key/value heads, for more devices than there are such heads

Training and the full-sequence form leave the collectives to the compiler, except those of the
experts. The serving step writes all of them out (`Layout`), so that nothing but activations can
ever travel: it is one `shard_map`, in which kernels see the arrays of one device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError, TopologyError

MESH_AXES = ("data", "expert", "tensor", "copy")
# Names of the dimensions that a mesh splits, for messages.
_NAMES = {
    "E": "experts",
    "F": "feed-forward channels",
    "K": "key/value heads",
    "N": "query heads",
    "V": "tokens of the vocabulary",
}

MeshAxes = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Axis letter -> mesh axes. Letters that are not named here are never split.

    As it stands, attention is split by heads over all of `expert` and `tensor`, and every device
    sees all tokens of its part of `data`. `of` adapts that to a model.
    """

    B: MeshAxes = ("data",)  # rows of a batch, and the flat tokens of the serving step
    E: MeshAxes = ("expert",)
    F: MeshAxes = ("tensor", "copy")
    K: MeshAxes = ("expert", "tensor")
    N: MeshAxes = ("expert", "tensor", "copy")
    P: MeshAxes = ("data",)  # pages belong to the sequences that are split
    V: MeshAxes = ("expert", "tensor", "copy")

    @classmethod
    def of(cls, config: ModelConfig, mesh: Mesh, dp_attention: bool = False) -> "ShardingRules":
        """The rules of a model on a mesh.

        With `dp_attention` sequences, not heads, are split over `expert`: each device computes the
        attention of its own sequences, whose pages it holds alone, and tokens travel to the experts
        and back. For more devices than key/value heads, and where heads do not divide.

        Raises ConfigError for a mesh that `make_mesh` does not make, and where `dp_attention` is
        asked of a mesh with one device along `expert`.
        """
        _check_mesh(mesh)
        if dp_attention and mesh.shape["expert"] == 1:
            raise ConfigError(
                "--dp-attention splits sequences over the mesh's expert axis, which has one device "
                f"here ({mesh_text(mesh)}); leave it out, or give --mesh with expert=2 or more"
            )
        heads = mesh.shape["expert"] * mesh.shape["tensor"]
        dp_attention |= config.num_kv_heads % heads != 0 or bool(
            config.num_heads % (heads * mesh.shape["copy"])
        )
        # Without experts, `expert` is more of `tensor`.
        split: MeshAxes = ("tensor", "copy") if config.is_moe else ("expert", "tensor", "copy")
        # Copying a vocabulary that cannot be split evenly costs little.
        words = next(
            axes
            for axes in (("expert", "tensor", "copy"), ("tensor", "copy"), ("expert",), ())
            if config.vocab_size % math.prod(mesh.shape[axis] for axis in axes) == 0
        )
        if not dp_attention:
            return cls(F=split, V=words)
        rows = ("data", "expert")
        return cls(B=rows, P=rows, K=("tensor",), N=("tensor", "copy"), F=split, V=words)

    def spec(self, axes: str) -> PartitionSpec:
        """PartitionSpec of an array whose dimensions are the letters of `axes`, e.g. "EFD".

        Raises ValueError where two dimensions would be split over one mesh axis.
        """
        names = [getattr(self, letter, None) for letter in axes]
        split = [axis for axes_of_letter in names for axis in axes_of_letter or ()]
        if len(split) != len(set(split)):
            raise ValueError(f"{axes!r} would split two dimensions over one mesh axis: {names}")
        return PartitionSpec(*(name[0] if name and len(name) == 1 else name for name in names))

    def sharding(self, axes: str, mesh: Mesh) -> NamedSharding:
        """The sharding on a mesh of an array whose dimensions are the letters of `axes`."""
        return NamedSharding(mesh, self.spec(axes))

    def ways(self, letter: str, mesh: Mesh) -> int:
        """Number of parts that a dimension is split into."""
        return math.prod(mesh.shape[axis] for axis in getattr(self, letter, None) or ())

    def check(self, config: ModelConfig, mesh: Mesh) -> None:
        """Raises ConfigError if a dimension of the model cannot be split evenly over the mesh."""
        for field in fields(self):
            size = config.axis_sizes.get(field.name)
            ways = self.ways(field.name, mesh)
            if size and size % ways:
                axes = " x ".join(axis for axis in getattr(self, field.name))
                raise ConfigError(
                    f"{size} {_NAMES.get(field.name, field.name)} cannot be split {ways} ways over "
                    f"the mesh ({axes}); choose a divisor of {size}"
                )


def make_mesh(
    data: int = 1,
    expert: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    copies: int = 1,
) -> Mesh:
    """Mesh over the first data * expert * tensor devices.

    Of the `tensor` devices, `copies` hold the same key/value heads; `copies_of` says how many must.
    Raises TopologyError if a size is not 1 or more, or there are too few devices.
    """
    sizes = {"data": data, "expert": expert, "tensor": tensor, "copies": copies}
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < 1:
            raise TopologyError(f"a mesh of {name}={size!r}: sizes are whole numbers from 1")
    devices = list(jax.devices() if devices is None else devices)
    count = data * expert * tensor
    if count > len(devices):
        raise TopologyError(
            f"a mesh of data={data} x expert={expert} x tensor={tensor} needs {count} devices, "
            f"there are {len(devices)}"
        )
    if tensor % copies:
        raise TopologyError(f"tensor={tensor} cannot hold {copies} copies of each key/value head")
    # Auto: the compiler propagates shardings; jax's default, Explicit, would put them into types.
    grid = mesh_utils.create_device_mesh(
        (data, expert, tensor // copies, copies),
        devices[:count],
        allow_split_physical_axes=True,  # a mesh axis need not be one of a TPU's own
    )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def copies_of(config: ModelConfig, expert: int, tensor: int, dp_attention: bool = False) -> int:
    """Number of devices that must hold the same key/value head; 1 where copies do not help."""
    heads = tensor if dp_attention else expert * tensor
    for copies in range(1, tensor + 1):
        if tensor % copies == 0 and config.num_kv_heads % (heads // copies) == 0:
            return copies
    return 1


def mesh_for(
    config: ModelConfig,
    text: str = "auto",
    dp_attention: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh | None:
    """The mesh that a flag names, such as "data=1,expert=8,tensor=1", with the copies it needs.

    "auto" takes all devices: experts first, then heads; None for a single CPU, which needs no mesh.
    Raises ConfigError if the text is not of this form, or the model cannot be split so, and
    TopologyError if there is no device.
    """
    devices = list(jax.devices() if devices is None else devices)
    if not devices:
        raise TopologyError("there are no devices to place the model on; give at least one")
    if text == "auto":
        if len(devices) == 1 and devices[0].platform == "cpu":
            return None
        sizes = _auto(config, len(devices), dp_attention)
    else:
        sizes = mesh_sizes(text)
    data, expert, tensor = sizes
    copies = copies_of(config, expert, tensor, dp_attention)
    try:
        mesh = make_mesh(data, expert, tensor, devices, copies)
    except TopologyError as error:
        raise ConfigError(str(error)) from None
    ShardingRules.of(config, mesh, dp_attention).check(config, mesh)
    return mesh


def _check_mesh(mesh: Mesh) -> None:
    """Raises ConfigError for what is no mesh with the axes that the rules name."""
    if not isinstance(mesh, Mesh):
        problem = f"the mesh is a {type(mesh).__name__}"
    elif mesh.axis_names != MESH_AXES:
        problem = f"the mesh has the axes {mesh.axis_names}, not {MESH_AXES}"
    elif set(mesh.axis_types) != {AxisType.Auto}:
        problem = f"the mesh has axes of the types {mesh.axis_types}, not Auto"
    else:
        return
    raise ConfigError(
        f"{problem}; make it with mixtral_jax.make_mesh(data, expert, tensor), or give a text such "
        "as expert=4,tensor=2"
    )


def mesh_text(mesh: Mesh) -> str:
    """The text of a mesh that `mesh_for` takes, such as "data=1,expert=8,tensor=1"."""
    tensor = mesh.shape["tensor"] * mesh.shape["copy"]
    return f"data={mesh.shape['data']},expert={mesh.shape['expert']},tensor={tensor}"


def mesh_sizes(text: str) -> tuple[int, int, int]:
    """Sizes of data, expert and tensor in a mesh's text; raises ConfigError for other texts."""
    named = MESH_AXES[:3]
    sizes = dict.fromkeys(named, 1)
    given: set[str] = set()
    for entry in text.split(","):
        name, _, number = entry.strip().partition("=")
        if name not in sizes or not number.isdecimal() or int(number) < 1:
            raise ConfigError(
                f"mesh {text!r}: {entry.strip()!r} is not one of {', '.join(named)} with a size; "
                "write data=1,expert=8,tensor=1, or auto"
            )
        if name in given:
            raise ConfigError(f"mesh {text!r}: {name} is there twice; give it one size")
        given.add(name)
        sizes[name] = int(number)
    return sizes["data"], sizes["expert"], sizes["tensor"]


def _auto(config: ModelConfig, count: int, dp_attention: bool) -> tuple[int, int, int]:
    """Splits experts as far as they divide, then heads; `data` takes the remaining devices."""
    expert = math.gcd(config.num_experts, count) if config.is_moe else 1
    rest = count // expert
    for tensor in range(rest, 1, -1):
        heads = (1 if dp_attention else expert) * tensor
        copies = copies_of(config, expert, tensor, dp_attention)
        divides = config.num_heads % heads == 0 == config.feed_forward_size % tensor
        if rest % tensor == 0 and divides and config.num_kv_heads % (heads // copies) == 0:
            return rest // tensor, expert, tensor
    return rest, expert, 1
