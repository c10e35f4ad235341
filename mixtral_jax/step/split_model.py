"""A model taken apart for compiled programs: its arrays flat, its modules without them.

Under a mesh each program is one `shard_map`: every device runs it on its own parts of parameters
and pages, and the model writes out the collectives (`Layout`).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mixtral_jax.config import ModelConfig
from mixtral_jax.layout import Layout
from mixtral_jax.model.adapter_stack import BlockStacks
from mixtral_jax.model.arrangement import arrange
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.placement import Placement

# ShapeDtypeStruct where programs are only compiled.
Arrays = tuple[jax.Array | jax.ShapeDtypeStruct, ...]
REPLICATED = PartitionSpec()


class ModuleStructure(NamedTuple):
    """A module without its arrays; modules with equal structures share compilations."""

    graph: nnx.GraphDef[nnx.Module]
    tree: jax.tree_util.PyTreeDef
    specs: tuple[PartitionSpec, ...]  # one for each array

    @classmethod
    def of(cls, module: nnx.Module, layout: Layout | None) -> tuple["ModuleStructure", Arrays]:
        """Returns the structure and the flat arrays.

        The arrays are flat because flattening an nnx.State on every call costs more than the call.
        """
        graph, state = nnx.split(module)
        arrays, tree = jax.tree.flatten(state)
        variables = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
        specs = [
            REPLICATED if layout is None else layout.rules.spec(variable.get_metadata("axes"))
            for variable in variables
        ]
        return cls(graph, tree, tuple(specs)), tuple(arrays)

    def module(self, arrays: Arrays) -> Any:
        """Returns the module with these arrays; it has the type of the one that was taken apart."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, arrays))


@dataclass(frozen=True)
class SplitModel:
    """A Transformer taken apart: the arrays of each block, and those around the blocks.

    Blocks whose arrays have the same shapes and dtypes are of one form, and share compilations.
    Most models have one form; one with weights of several dtypes has more.
    """

    blocks: tuple[Arrays, ...]
    rest: Arrays
    forms: tuple[int, ...]  # of each block, an index of `block_structures`
    block_structures: tuple[ModuleStructure, ...]  # of each form
    rest_structure: ModuleStructure
    placement: Placement
    config: ModelConfig
    dtype: DTypeLike  # of activations between the blocks

    @classmethod
    def of(cls, model: Transformer) -> "SplitModel":
        """Takes a model apart, which may be abstract; it must not be changed afterwards.

        Its weights are arranged in place: see model/arrangement.py.
        """
        arrange(model)
        layers, around = model.apart()
        blocks = [ModuleStructure.of(block, model.layout) for block in layers]
        rest_structure, rest = ModuleStructure.of(around, model.layout)
        shapes = [tuple((a.shape, a.dtype) for a in arrays) for _, arrays in blocks]
        distinct = list(dict.fromkeys(shapes))
        forms = tuple(map(distinct.index, shapes))
        return cls(
            blocks=tuple(arrays for _, arrays in blocks),
            rest=rest,
            forms=forms,
            block_structures=tuple(blocks[forms.index(i)][0] for i in range(len(distinct))),
            rest_structure=rest_structure,
            placement=model.placement,
            config=model.config,
            dtype=model.dtype,
        )

    @property
    def layout(self) -> Layout | None:
        """The mesh and the rules on it; None for one device."""
        return self.placement.layout

    @property
    def num_sequence_groups(self) -> int:
        """Number of groups that the mesh splits the sequences into; 1 without a mesh."""
        return 1 if self.layout is None else self.layout.num_sequence_groups

    def pages(
        self, num_pages: int, page_size: int, dtype: DTypeLike | None = None
    ) -> jax.ShapeDtypeStruct:
        """Returns shape and sharding of each layer's pages.

        Args:
            num_pages: of each sequence group.
            page_size: tokens of a page.
            dtype: of keys and values, such as int8; None for the model's own.
        """
        kind = self.dtype if dtype is None else dtype
        page = self.placement.page_form(self.config, page_size, kind)
        if self.layout is None:
            return jax.ShapeDtypeStruct((num_pages, *page.shape), page.dtype)
        axes, shape = "P" + page.axes, (num_pages, *page.shape)
        rules, mesh = self.layout.rules, self.layout.mesh
        whole = tuple(n * rules.ways(axis, mesh) for axis, n in zip(axes, shape, strict=True))
        return jax.ShapeDtypeStruct(whole, page.dtype, sharding=self.layout.sharding(axes))

    def replicate(self, array: np.ndarray) -> jax.Array:
        """Puts an array of the host on every device of the mesh, to be given to many steps."""
        if self.layout is None:
            return jax.device_put(array)
        sharding = NamedSharding(self.layout.mesh, REPLICATED)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def stack_specs(self, stacks: BlockStacks) -> Any:
        """Returns the specs of a layer's stacks of adapters, as `jit` takes them."""
        if self.layout is None:
            return REPLICATED
        return stacks.specs(self.config, self.placement)

    def spec(self, letters: str) -> PartitionSpec:
        """Returns the spec of an array whose dimensions are the letters."""
        return REPLICATED if self.layout is None else self.layout.rules.spec(letters)

    def jit(
        self, function: Callable[..., Any], given: Any, out: Any, donate: tuple[int, ...] = ()
    ) -> Any:
        """Returns jax.jit of a function, under a mesh of each device's parts of its arguments.

        `given` and `out` are specs as jax.shard_map takes them.
        """
        options = compiler_options(self.placement.kernels.platform)
        if self.layout is None:
            return jax.jit(function, donate_argnums=donate, compiler_options=options)
        mesh = self.layout.mesh
        # Kernels do not say over which axes their results vary, so nothing can check it.
        mapped = jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=out, check_vma=False)
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            given,
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )
        return jax.jit(
            mapped, in_shardings=shardings, donate_argnums=donate, compiler_options=options
        )


# The kinds that XLA puts into CUDA graphs by itself, and conditions and loops.
_IN_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"


def compiler_options(platform: str) -> dict[str, str] | None:
    """The options with which a step is compiled for a platform; None for XLA's own.

    On a GPU conditions become part of CUDA graphs. By itself XLA reads on the host which branch is
    taken, so that a launch waits there for all before it, and the next step is planned and launched
    while the card has nothing to do: on an H100 a step of 8 layers of Mistral-7B takes 1.65 ms
    instead of 3.40. A list in XLA_FLAGS is left as it is.
    """
    name = "xla_gpu_enable_command_buffer"
    if platform != "gpu" or name in os.environ.get("XLA_FLAGS", ""):
        return None
    return {name: _IN_GRAPHS}
