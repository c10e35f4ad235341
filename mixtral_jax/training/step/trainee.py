"""Trainee: the arrays that a run trains, and the model that they and the frozen ones make.

An adapter is trained beside parameters that stay as they are; these are arguments of the compiled
step, never constants in it. Full fine-tuning trains float32 masters of all parameters, which the
forward pass casts to the dtype of the model. Where a mesh has a `data` axis the trained arrays, and
with them moments and gradients, are cut over it as well (ZeRO-3, arXiv:1910.02054), and those of a
layer are gathered where the layer is computed.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax.layout import Layout
from mixtral_jax.model.adapter import (
    Adapter,
    AdapterConfig,
    BlockAdapter,
    LowRank,
    adapter_letters,
)
from mixtral_jax.model.arrangement import arrange
from mixtral_jax.model.transformer import Block, Transformer, named_parameters
from mixtral_jax.training.step.gathered_block import GatheredBlock

# The trained arrays, all float32: an Adapter, or the masters by their dotted names.
Trained = Adapter | dict[str, Any]
DATA, LAYERS = "data", "layers"


class Trainee:
    """A model and the part of it that is trained.

    Args:
        model: with its weights, or abstract.
        adapter: settings of the adapter to train; None trains all parameters.
    """

    def __init__(self, model: Transformer, adapter: AdapterConfig | None) -> None:
        self.config, self.placement, self.adapter = model.config, model.placement, adapter
        # Samples are drawn by steps, which would arrange the weights under the compiled program.
        arrange(model)
        self.graph, state = nnx.split(model)
        # Names, shapes and shardings only, so that nothing here keeps the weights alive.
        self.skeleton = nnx.to_flat_state(jax.tree.map(_shape_of, state))
        self.letters = {
            name: str(variable.get_metadata("axes"))
            for name, variable in named_parameters(model).items()
        }
        self.dtypes = {_name(path): entry.get_value().dtype for path, entry in self.skeleton}

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
            shapes = Adapter.random(self.config, self.adapter, None)
            return Adapter(tuple(self._each(block, self._cut) for block in shapes.layers))
        return {
            _name(path): self._cut(variable.get_value(), self.letters[_name(path)])
            for path, variable in self.skeleton
        }

    def initial(self, model: Transformer, key: jax.Array) -> Trained:
        """The trained arrays at the start: a new adapter, or copies of the model's parameters."""
        shardings = None
        if self.layout is not None:
            shardings = jax.tree.map(lambda shape: shape.sharding, self.abstract())
        if self.adapter is not None:
            adapter = Adapter.random(self.config, self.adapter, key)
            return adapter if shardings is None else jax.device_put(adapter, shardings)
        values = {name: entry.get_value() for name, entry in named_parameters(model).items()}
        copy = jax.jit(
            lambda tree: jax.tree.map(lambda x: jnp.copy(x.astype(jnp.float32)), tree),
            out_shardings=shardings,
        )
        masters: dict[str, jax.Array] = copy(values)
        return masters

    def assemble(self, trained: Trained, frozen: Any) -> tuple[Transformer, Adapter | None]:
        """The model for full forms, and the adapter with its scaling folded in.

        A pure function of arrays. Trained arrays of layers are gathered where these are computed.
        """
        if self.adapter is not None:
            assert isinstance(trained, Adapter)
            model: Transformer = nnx.merge(self.graph, frozen)
            adapter: Adapter | None = trained.folded(self.adapter)
        else:
            model, adapter = self._model(trained, is_whole=False), None
        model.layers = nnx.List(
            [
                GatheredBlock(block, partial(self._gathered, layer))
                for layer, block in enumerate(model.layers)
            ]
        )
        return model, adapter

    def tuned(self, trained: Trained) -> Transformer:
        """The model of full fine-tuning, in its own dtype and sharding."""
        return self._model(trained, is_whole=True)

    def whole(self, adapter: Adapter) -> Adapter:
        """An adapter that every device has as a whole, such as a process writes it."""
        if self.layout is None:
            return adapter
        everywhere = NamedSharding(self.layout.mesh, PartitionSpec())
        gathered: Adapter = jax.jit(lambda tree: tree, out_shardings=everywhere)(adapter)
        return gathered

    def constrained(self, gradient: Trained) -> Trained:
        """The gradient, laid out as the trained arrays are."""
        if self.layout is None:
            return gradient
        shardings = jax.tree.map(lambda shape: shape.sharding, self.abstract())
        constrained: Trained = jax.lax.with_sharding_constraint(gradient, shardings)
        return constrained

    def _model(self, masters: Trained, *, is_whole: bool) -> Transformer:
        """The model of all masters; those of layers are still masters unless `is_whole`."""
        assert isinstance(masters, dict)
        filled = []
        for path, variable in self.skeleton:
            name = _name(path)
            is_kept = path[0] == LAYERS and not is_whole
            value = masters[name] if is_kept else self._parameter(name, masters[name])
            filled.append((path, variable.replace(value)))
        model: Transformer = nnx.merge(self.graph, nnx.from_flat_state(filled))
        return model

    def _gathered(
        self, layer: int, block: Block, beside: BlockAdapter
    ) -> tuple[Block, BlockAdapter]:
        """A layer's block and adapter as they compute."""
        if self.adapter is not None:
            return block, self._each(beside, self._shared)
        graph, state = nnx.split(block)
        filled = [
            (path, entry.replace(self._parameter(_name((LAYERS, layer, *path)), entry.get_value())))
            for path, entry in nnx.to_flat_state(state)
        ]
        gathered: Block = nnx.merge(graph, nnx.from_flat_state(filled))
        return gathered, beside

    def _parameter(self, name: str, master: jax.Array) -> jax.Array:
        """The model's parameter that a master makes."""
        value, letters = master.astype(self.dtypes[name]), self.letters[name]
        if self.layout is not None:  # else the compiler gathers float32 and casts it then
            cut = cut_sharding(value.shape, letters, self.layout)
            value = jax.lax.with_sharding_constraint(value, cut)
        return self._shared(value, letters)

    def _shared(self, array: jax.Array, letters: str) -> jax.Array:
        """The array in the model's sharding, whole along `data`."""
        if self.layout is None:
            return array
        return jax.lax.with_sharding_constraint(array, self.layout.sharding(letters))

    def _cut(self, array: Any, letters: str) -> jax.ShapeDtypeStruct:
        """The shape of a trained array with its sharding."""
        sharding = None
        if self.layout is not None:
            sharding = cut_sharding(array.shape, letters, self.layout)
        return jax.ShapeDtypeStruct(array.shape, jnp.float32, sharding=sharding)

    def _each(self, block: BlockAdapter, change: Callable[[Any, str], Any]) -> BlockAdapter:
        """The block's matrices, each changed by a function of the array and its letters."""
        changed = {}
        for target, low in block._asdict().items():
            if low is not None:
                letters = adapter_letters(target, self.config)
                changed[target] = LowRank(*map(change, low, letters))
        return BlockAdapter(**changed)


def cut_sharding(shape: tuple[int, ...], letters: str, layout: Layout) -> NamedSharding:
    """The sharding of a trained array: the model's own, and `data` over one dimension more.

    That is the largest dimension that it divides; an array without one is the same on all devices
    along `data`.
    """
    sizes = layout.mesh.shape
    axes = [tuple(getattr(layout.rules, letter, None) or ()) for letter in letters]
    held = [n // math.prod(sizes[axis] for axis in own) for n, own in zip(shape, axes, strict=True)]
    divided = [i for i, size in enumerate(held) if size % sizes[DATA] == 0]
    if sizes[DATA] > 1 and divided:
        largest = max(divided, key=lambda i: shape[i])
        axes[largest] += (DATA,)
    return NamedSharding(layout.mesh, PartitionSpec(*(own or None for own in axes)))


def _name(path: Iterable[Any]) -> str:
    """The dotted name of a parameter."""
    return ".".join(map(str, path))


def _shape_of(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
