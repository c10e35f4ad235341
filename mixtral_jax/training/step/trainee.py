"""Trainee: the arrays that a run trains, and the model that they and the frozen ones make.

An adapter is trained beside parameters that stay as they are; these are arguments of the compiled
step, never constants in it. Full fine-tuning trains float32 masters of all parameters, which the
forward pass casts to the dtype of the model. Where a mesh has a `data` axis the masters, and with
them moments and gradients, are cut over it as well (ZeRO-3, arXiv:1910.02054), and a weight is
gathered where it is used.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax.layout import Layout
from mixtral_jax.model.adapter import Adapter, AdapterConfig
from mixtral_jax.model.transformer import Transformer, named_parameters

# The trained arrays, all float32: an Adapter, or the masters by their dotted names.
Trained = Adapter | dict[str, Any]
DATA = "data"


class Trainee:
    """A model and the part of it that is trained.

    Args:
        model: with its weights, or abstract.
        adapter: settings of the adapter to train; None trains all parameters.
    """

    def __init__(self, model: Transformer, adapter: AdapterConfig | None) -> None:
        self.config, self.placement, self.adapter = model.config, model.placement, adapter
        self.graph, state = nnx.split(model)
        # Names, shapes and shardings only, so that nothing here keeps the weights alive.
        self.skeleton = nnx.to_flat_state(jax.tree.map(_shape_of, state))
        self.letters = {
            name: str(variable.get_metadata("axes"))
            for name, variable in named_parameters(model).items()
        }

    @property
    def layout(self) -> Layout | None:
        """The mesh and the rules on it; None for one device."""
        return self.placement.layout

    def frozen(self, model: Transformer) -> Any:
        """The parameters that stay as they are: a tree of arrays, empty in full fine-tuning."""
        return nnx.split(model)[1] if self.adapter is not None else {}

    def abstract(self) -> Trained:
        """Shapes and shardings of the trained arrays."""
        if self.adapter is not None:
            return Adapter.random(self.config, self.adapter, None, self.layout)
        shapes = {
            ".".join(map(str, path)): variable.get_value() for path, variable in self.skeleton
        }
        return {
            name: jax.ShapeDtypeStruct(
                shape.shape,
                jnp.float32,
                sharding=None
                if self.layout is None
                else master_sharding(shape.shape, self.letters[name], self.layout),
            )
            for name, shape in shapes.items()
        }

    def initial(self, model: Transformer, key: jax.Array) -> Trained:
        """The trained arrays at the start: a new adapter, or copies of the model's parameters."""
        if self.adapter is not None:
            return Adapter.random(self.config, self.adapter, key, self.layout)
        values = {name: entry.get_value() for name, entry in named_parameters(model).items()}
        shardings = None
        if self.layout is not None:
            shardings = {name: shape.sharding for name, shape in self.abstract().items()}  # type: ignore[union-attr]
        copy = jax.jit(
            lambda tree: jax.tree.map(lambda x: jnp.copy(x.astype(jnp.float32)), tree),
            out_shardings=shardings,
        )
        masters: dict[str, jax.Array] = copy(values)
        return masters

    def assemble(self, trained: Trained, frozen: Any) -> tuple[Transformer, Adapter | None]:
        """The model, and the adapter with its scaling folded in; a pure function of arrays."""
        if self.adapter is not None:
            assert isinstance(trained, Adapter)
            model: Transformer = nnx.merge(self.graph, frozen)
            return model, trained.folded(self.adapter)
        assert isinstance(trained, dict)
        filled = []
        for path, variable in self.skeleton:
            name = ".".join(map(str, path))
            value = trained[name].astype(variable.get_value().dtype)
            if self.layout is not None:
                gathered = self.layout.sharding(self.letters[name])
                value = jax.lax.with_sharding_constraint(value, gathered)
            filled.append((path, variable.replace(value)))
        whole: Transformer = nnx.merge(self.graph, nnx.from_flat_state(filled))
        return whole, None

    def constrained(self, gradient: Trained) -> Trained:
        """The gradient, laid out as the trained arrays are."""
        if self.layout is None:
            return gradient
        shardings = jax.tree.map(lambda shape: shape.sharding, self.abstract())
        constrained: Trained = jax.lax.with_sharding_constraint(gradient, shardings)
        return constrained


def master_sharding(shape: tuple[int, ...], letters: str, layout: Layout) -> NamedSharding:
    """The sharding of a master: the model's own, and `data` over the largest dimension it divides.

    An array without such a dimension is the same on all devices along `data`.
    """
    sizes = layout.mesh.shape
    axes = [tuple(getattr(layout.rules, letter, None) or ()) for letter in letters]
    held = [n // math.prod(sizes[axis] for axis in own) for n, own in zip(shape, axes, strict=True)]
    divided = [i for i, size in enumerate(held) if size % sizes[DATA] == 0]
    if sizes[DATA] > 1 and divided:
        largest = max(divided, key=lambda i: shape[i])
        axes[largest] += (DATA,)
    return NamedSharding(layout.mesh, PartitionSpec(*(own or None for own in axes)))


def _shape_of(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
