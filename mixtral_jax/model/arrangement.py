"""The order of a model's weights in memory, which its kernels choose."""

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from mixtral_jax.layout import Layout
from mixtral_jax.model.layers import Linear
from mixtral_jax.model.moe import ExpertMatrix
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.weight import TILE, Weight

_Matrix = Linear | ExpertMatrix


def arrange(model: Transformer) -> None:
    """Puts the weights into the order in which the model's kernels read them best, in place.

    A weight at a time, which is then in memory twice. All that computes with a model takes either
    order (weight.py), and kernels that are given the other one change it on every call. So do those
    under a mesh that splits a weight's inputs, whose parts cannot be put in order as a whole.

    The model may be abstract.
    """
    kernels, layout = model.placement.kernels, model.layout
    for _, module, inputs in _matrices(model):
        before = _arrays(module)
        if not before.is_in_groups or not _has_whole_tiles(module, inputs, layout):
            continue
        after: Any = jax.eval_shape(lambda weight, n=inputs: kernels.arranged(weight, n), before)
        if after.values.dtype == before.values.dtype:
            continue
        if isinstance(before.values, jax.ShapeDtypeStruct):
            after = jax.tree.map(_with_sharding, after, before)
        else:
            own = jax.tree.map(lambda array: array.sharding, before)
            after = jax.jit(kernels.arranged, static_argnums=1, out_shardings=own)(before, inputs)
        module.weight.set_value(after.values)
        module.scale.set_value(after.scale)


def stored_parameters(model: Transformer) -> dict[str, Any]:
    """The parameters by their dotted names, in the order that checkpoints have.

    Those that are arranged are in memory twice meanwhile.
    """
    named = {name: variable.get_value() for name, variable in named_parameters(model).items()}
    for name, module, inputs in _matrices(model):
        weight = _arrays(module)
        if weight.is_in_tiles:
            named[f"{name}.weight"], named[f"{name}.scale"] = weight.in_rows(inputs)
    return named


def _matrices(model: Transformer) -> Iterator[tuple[str, Any, int]]:
    """The layers with scales, their names, and how many axes of their weights are inputs."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, _Matrix) and module.scale is not None:
            inputs = module.num_inputs if isinstance(module, Linear) else 1
            yield ".".join(map(str, path)), module, inputs


def _arrays(module: Any) -> Weight:
    return Weight(module.weight.get_value(), module.scale.get_value())


def _has_whole_tiles(module: Any, inputs: int, layout: Layout | None) -> bool:
    """Says whether each device has whole outputs, and whole tiles of the last axis of them."""
    if layout is None:
        return True
    letters: str = module.weight.get_metadata("axes")
    ways = [layout.rules.ways(letter, layout.mesh) for letter in letters]
    outputs = module.weight.get_value().shape[-inputs - 1] // ways[-inputs - 1]
    return outputs % TILE == 0 and max(ways[-inputs:]) == 1


def _with_sharding(shape: jax.ShapeDtypeStruct, before: jax.ShapeDtypeStruct) -> Any:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=before.sharding)
