"""Placement: a model placed on devices, by one function for load, generate, plan, serve and train.

A placement holds everything that follows from the config, the dtype and the devices: the mesh with
its rules, the dtypes, the kernels, the size of a page, the sizes of a step. Whoever runs a model
takes these from its placement, so what is planned is what is served.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mixtral_jax.cache import PageForm
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError, TopologyError
from mixtral_jax.kernels import Kernels, kernels_for, kernels_for_device
from mixtral_jax.layout import Layout
from mixtral_jax.sharding import ShardingRules, mesh_for, mesh_text
from mixtral_jax.weight import GROUPS, INT8_GROUPS, QUANTIZED

DTYPES = ("float32", "bfloat16", *QUANTIZED)
# The weights of a layer that a model's dtype rounds, by their names within the layer.
LAYER_WEIGHTS = (
    *(f"attention.{name}" for name in "qkvo"),
    *(f"feed_forward.{name}" for name in ("gate", "up", "down")),
)
# Weights whose dtype is not the model's: ("layers.0.attention.v", "int8"), sorted.
WeightDtypes = tuple[tuple[str, str], ...]
# The dtypes that single weights of a model may have beside its own.
_BESIDE = {"int4": ("int8", INT8_GROUPS), "int8": (INT8_GROUPS,)}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A model's devices, dtypes and kernels. Models of equal placements share their programs."""

    dtype: str  # of weights: float32, bfloat16, or int8, int4 and fp8 with scales
    activation_dtype: str  # of what flows between the products, and of cached keys and values
    layout: Layout | None  # the mesh and the rules on it; None for one device
    kernels: Kernels
    weight_dtypes: WeightDtypes = ()  # of single weights, where they differ from `dtype`
    # New tokens of a step of the plain loop; a longer prompt comes in several. None: by chip, from
    # the roofline that stands above the model (roofline/settings.py).
    step_tokens: int | None = None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        dtype: DTypeLike = "float32",
        mesh: Mesh | str | None = "auto",
        dp_attention: bool = False,
        devices: Sequence[jax.Device] | None = None,
        weight_dtypes: Mapping[str, str] | WeightDtypes = (),
    ) -> "Placement":
        """Places a model on devices, which may be absent ones that programs are compiled for.

        Args:
            config: the model.
            dtype: of its weights: float32, bfloat16, int8, int4 or fp8 (float8_e4m3fn).
            mesh: a mesh, "auto" for all devices, or a text such as "data=1,expert=8,tensor=1"; None
                for one device. A text also makes the copies of key/value heads that it needs.
            dp_attention: splits sequences, not heads, over the mesh's expert axis, which must have
                two devices or more.
            devices: those that a text is about; None for all of this process group's.
            weight_dtypes: of weights that have another dtype than the model's, by their names:
                "layers.0.attention.v" of an int4 model may be int8.

        Raises ConfigError for a dtype that models do not have, a mesh of other axes than
        `make_mesh` gives, or one that the model cannot be split over, and TopologyError where there
        is no device.
        """
        name = checked_dtype(dtype)
        weight_dtypes = checked_weight_dtypes(config, name, weight_dtypes)
        if devices is not None and len(devices) == 0:
            raise TopologyError("there are no devices to place the model on; give at least one")
        if isinstance(mesh, str):
            mesh = mesh_for(config, mesh, dp_attention, devices)
        if mesh is not None:
            layout = Layout(mesh, ShardingRules.of(config, mesh, dp_attention))
            layout.rules.check(config, mesh)
            for own in dtypes_of("feed_forward.down", config, name, weight_dtypes) & GROUPS.keys():
                _check_groups(config, own, layout.rules.ways("F", mesh))
            device = mesh.devices.flat[0]
        else:
            if dp_attention:
                raise ConfigError(
                    "--dp-attention splits sequences over the expert axis of a mesh, and one "
                    "device has no mesh; leave it out, or give --mesh with expert=2 or more"
                )
            layout = None
            device = (jax.devices() if devices is None else list(devices))[0]
        kernels = kernels_for_device(device)
        return cls(
            dtype=name,
            activation_dtype=kernels.activation_dtype(name),
            layout=layout,
            kernels=kernels,
            weight_dtypes=weight_dtypes,
        )

    def of_layer(self, layer: int) -> "Placement":
        """The same for one layer, whose weights have their names within it."""
        prefix = f"layers.{layer}."
        own = tuple(
            (name.removeprefix(prefix), dtype)
            for name, dtype in self.weight_dtypes
            if name.startswith(prefix)
        )
        return replace(self, weight_dtypes=own)

    def dtype_of(self, name: str) -> str:
        """The dtype of a weight by its name, such as "attention.v" of a layer's placement."""
        return dict(self.weight_dtypes).get(name, self.dtype)

    @property
    def table_dtype(self) -> str:
        """The dtype of the embedding and of the head, which fp8 leaves in the activations' own.

        That is how FP8 models are published. Of an int4 model they are int8: a table of words is
        read row by row, and a head's errors go straight into the answers.
        """
        if self.dtype == "fp8":
            return self.activation_dtype
        return "int8" if self.dtype == "int4" else self.dtype

    @property
    def full_kernels(self) -> Kernels:
        """The kernels of the full forms, all of which differentiate.

        Under a mesh the compiler splits whole arrays, which it can do with XLA's forms only; what
        runs in a `shard_map` of its own, as experts do, takes `kernels.with_gradients()`.
        """
        return self.kernels.with_gradients() if self.layout is None else kernels_for("xla")

    @property
    def page_size(self) -> int:
        """Tokens of a page of keys and values."""
        return self.kernels.page_size

    @property
    def num_sequence_groups(self) -> int:
        """Groups of sequences that the mesh splits, each with pages of its own."""
        return 1 if self.layout is None else self.layout.num_sequence_groups

    @property
    def mesh_text(self) -> str | None:
        """The mesh as `--mesh` takes it; None for one device."""
        return None if self.layout is None else mesh_text(self.layout.mesh)

    def page_form(self, config: ModelConfig, page_size: int, dtype: DTypeLike) -> PageForm:
        """The form of a layer's pages of keys and values of `dtype` on one device.

        Raises ConfigError for a dtype whose pages the model's heads do not fit on these devices.
        """
        ways = 1 if self.layout is None else self.layout.rules.ways("K", self.layout.mesh)
        heads = config.num_kv_heads // ways
        return self.kernels.page_form(page_size, heads, config.head_size, dtype)

    def has_pages(self, config: ModelConfig, page_size: int, dtype: str) -> bool:
        """Says whether there are pages of a dtype beside the activations' own for a model."""
        if dtype not in self.kernels.kv_dtypes:
            return False
        try:
            self.page_form(config, page_size, dtype)
        except ConfigError:
            return False
        return True

    def checked_kv_dtype(self, dtype: DTypeLike | None, config: ModelConfig) -> str:
        """The dtype of cached keys and values; None asks for the activations' own.

        "fp8" is another name of float8_e4m3fn.

        Raises ConfigError for one that does not exist, or that the model's heads do not fit.
        """
        if dtype is None:
            return self.activation_dtype
        name = "float8_e4m3fn" if dtype == "fp8" else _dtype_name(dtype)
        possible = [self.activation_dtype, *sorted(self.kernels.kv_dtypes)]
        if name not in possible:
            raise ConfigError(
                f"keys and values of {name!r} are not supported for this model on "
                f"{self.kernels.platform}; use {' or '.join(map(flag_of, possible))}"
            )
        self.page_form(config, self.page_size, name)
        return name

    def check_deterministic(self, config: ModelConfig) -> None:
        """Raises ConfigError where a row's bits may depend on the rows beside it."""
        if self.layout is not None:
            raise ConfigError(
                "--deterministic is promised on one device; leave out the flag or --mesh"
            )
        if self.kernels.platform != "cpu" or self.dtype not in ("float32", "int8", "int4"):
            raise ConfigError(
                "--deterministic is promised on CPU for float32, int8 and int4; this is "
                f"{self.dtype} on {self.kernels.platform}: leave the flag out, or "
                "give --dtype float32"
            )
        lanes = self.kernels.deterministic_heads
        if lanes is None:
            raise ConfigError(
                "--deterministic needs the CPU kernels, which were not built; install a C++ "
                "compiler"
            )
        if config.head_size % lanes:
            raise ConfigError(
                f"--deterministic needs heads of a multiple of {lanes} values; this model's have "
                f"{config.head_size}: leave the flag out"
            )


def _check_groups(config: ModelConfig, dtype: str, ways: int) -> None:
    """Raises ConfigError if a device would hold a part of a group of weights' inputs."""
    channels, group = config.feed_forward_size, GROUPS[dtype]
    if channels // ways % group:
        raise ConfigError(
            f"{dtype} weights have groups of {group} inputs, and {channels} feed-forward channels "
            f"cannot be split {ways} ways without cutting one; use fewer, or int8"
        )


def checked_weight_dtypes(
    config: ModelConfig, dtype: str, weight_dtypes: Mapping[str, str] | WeightDtypes
) -> WeightDtypes:
    """Dtypes of single weights in order; raises ConfigError for those that there cannot be."""
    given = dict(weight_dtypes)
    names = {f"layers.{i}.{name}" for i in range(config.num_layers) for name in LAYER_WEIGHTS}
    possible = _BESIDE.get(dtype, ())
    for name, own in given.items():
        if name not in names:
            raise ConfigError(
                f"weight_dtypes names {name!r}, which is no weight of this model's layers; "
                "names are such as layers.0.attention.v"
            )
        if own not in possible:
            raise ConfigError(
                f"weight_dtypes has {own!r} for {name}, which cannot stand in a model of {dtype}; "
                + (f"use {' or '.join(possible)}" if possible else "leave it out")
            )
    return tuple(sorted(given.items()))


def dtypes_of(
    name: str, config: ModelConfig, dtype: str, weight_dtypes: WeightDtypes
) -> frozenset[str]:
    """The dtypes that a weight, by its name within a layer, has in a model's layers."""
    own = dict(weight_dtypes)
    return frozenset(own.get(f"layers.{i}.{name}", dtype) for i in range(config.num_layers))


def dtype_counts(weight_dtypes: WeightDtypes) -> dict[str, int]:
    """The number of weights of each dtype beside the model's: {"int8": 12}."""
    return dict(Counter(own for _, own in weight_dtypes))


def precision_text(dtype: str, weight_dtypes: WeightDtypes) -> str:
    """A model's dtypes for a reader: "int4, 12 weights in int8"."""
    counts = dtype_counts(weight_dtypes).items()
    return ", ".join([dtype, *(f"{count} weights in {own}" for own, count in counts)])


def flag_of(name: str) -> str:
    """The name that flags have for a dtype: fp8 for float8_e4m3fn."""
    return next((short for short, stored in QUANTIZED.items() if stored.name == name), name)


def checked_dtype(dtype: DTypeLike) -> str:
    """The name of a dtype that a model's weights can have; raises ConfigError for any other."""
    if dtype is None:  # which would be float64
        raise ConfigError(f"a dtype must be given; use {' or '.join(DTYPES)}")
    name = flag_of(_dtype_name(dtype))
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; use {' or '.join(DTYPES)}")
    return name


def _dtype_name(dtype: DTypeLike) -> str:
    """The name of a dtype; for what is none, its text."""
    try:
        return jnp.dtype(dtype).name
    except (TypeError, ValueError):
        return str(dtype)
