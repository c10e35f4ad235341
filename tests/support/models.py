"""Models with random weights, on one device or split over a mesh."""

from dataclasses import replace
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels import Kernels, kernels_for_device
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.placement import Placement, WeightDtypes
from mixtral_jax.weight import Weight


def whole_kernels_for(device: jax.Device) -> Kernels:
    """The kernels of a device, with steps of one program as on TPU and GPU."""
    return replace(kernels_for_device(device), whole_step=True)


def model_of(
    config: ModelConfig,
    dtype: Any = "float32",
    *,
    seed: int = 0,
    mesh: Mesh | str | None = None,
    dp_attention: bool = False,
    weight_dtypes: WeightDtypes = (),
) -> Transformer:
    """A model with weights drawn from `seed`; on one device without a mesh."""
    placement = Placement.of(config, dtype, mesh, dp_attention, weight_dtypes=weight_dtypes)
    return Transformer(config, placement, rngs=nnx.Rngs(seed))


def split_over(model: Transformer, mesh: Mesh, dp_attention: bool = False) -> Transformer:
    """A model with the same values, laid out over a mesh."""
    own = model.placement
    placement = Placement.of(
        model.config, own.dtype, mesh, dp_attention, weight_dtypes=own.weight_dtypes
    )
    target = Transformer(model.config, placement, rngs=None)
    values = named_parameters(model)
    tiled = any(Weight(v.get_value(), None).is_in_tiles for v in values.values())
    assert not tiled, "a part of an arranged weight is none of the weight"
    for name, variable in named_parameters(target).items():
        sharding = variable.get_value().sharding
        variable.set_value(jax.device_put(values[name].get_value(), sharding))
    return target
