"""The programs of one step, compiled for shapes: the only place that compiles them.

A step is a few programs: `embed`, `block` (called once for each layer), `pick` and `draw`. Where
some row has an adapter, `adapted_block` is called in place of `block`, and where one has a mask,
`draw_masked` in place of `draw`; all other steps run what they would run if there were neither. All
layers have the same shapes, so one compilation serves them all and the start does not grow with the
depth. What a sequence drew goes from `draw` to the next `embed` on the device, so a step can be
launched before the tokens of the previous one are read.

Under a mesh each program is one `shard_map`: every device runs it on its own parts of parameters
and pages, and the model writes out the collectives (`Layout`). A mesh may split the sequences into
groups, each with a flat row and pages of its own; the arrays on the host hold the groups one behind
the other. Drawn tokens are known to every device.

Only shapes are needed: the same programs are compiled for devices that are not there
(mixtral_jax/planning).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled
from jax.typing import DTypeLike

from mixtral_jax.axes import DrawnHidden, FlatHidden, FlatTokens, PagePairs, Pages, RowMasks, Rows
from mixtral_jax.cache import PagedCache, RaggedBatch
from mixtral_jax.config import ModelConfig
from mixtral_jax.layout import Layout
from mixtral_jax.model.adapter import UNCHANGED
from mixtral_jax.model.adapter_stack import (
    NO_ADAPTERS,
    Adapters,
    BlockStacks,
    StackSizes,
    slot_content,
)
from mixtral_jax.model.layers import Rotary
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.placement import Placement
from mixtral_jax.step.inputs import StepInputs, mask_words
from mixtral_jax.step.sampling import Sampled, SamplingArrays, sample

# ShapeDtypeStruct where programs are only compiled.
Arrays = tuple[jax.Array | jax.ShapeDtypeStruct, ...]
_REPLICATED = PartitionSpec()


@dataclass(frozen=True)
class Programs:
    """The compiled programs of a step of one size."""

    embed: Compiled  # (rest, batch, follows, tokens) -> batch with its tokens, x, rotary
    block: Compiled  # (block, x, rotary, pages, batch) -> x, pages; pages are donated
    pick: Compiled  # (x, tokens, last) -> x and tokens of the rows that draw
    draw: Compiled  # (rest, x, last tokens, sampling) -> Sampled
    draw_masked: Compiled | None  # (rest, x, last tokens, sampling, allowed) -> Sampled
    # (block, x, rotary, pages, batch, adapters) -> x, pages; None if no row has an adapter
    adapted_block: Compiled | None = None


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
            _REPLICATED if layout is None else layout.rules.spec(variable.get_metadata("axes"))
            for variable in variables
        ]
        return cls(graph, tree, tuple(specs)), tuple(arrays)

    def module(self, arrays: Arrays) -> Any:
        """Returns the module with these arrays; it has the type of the one that was taken apart."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, arrays))


@dataclass(frozen=True)
class SplitModel:
    """A Transformer taken apart: the arrays of each block, and those around the blocks."""

    blocks: tuple[Arrays, ...]
    rest: Arrays
    block_structure: ModuleStructure
    rest_structure: ModuleStructure
    placement: Placement
    config: ModelConfig
    dtype: DTypeLike  # of activations between the blocks

    @classmethod
    def of(cls, model: Transformer) -> "SplitModel":
        """Takes a model apart, which may be abstract; it must not be changed afterwards."""
        layers, around = model.apart()
        blocks = [ModuleStructure.of(block, model.layout) for block in layers]
        rest_structure, rest = ModuleStructure.of(around, model.layout)
        return cls(
            blocks=tuple(arrays for _, arrays in blocks),
            rest=rest,
            block_structure=blocks[0][0],
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
        pages = jax.eval_shape(
            lambda: PagedCache.empty(self.config, num_pages, page_size, kind)
        ).layers[0]
        if self.layout is None:
            return jax.ShapeDtypeStruct(pages.shape, pages.dtype)
        shape = (self.num_sequence_groups * pages.shape[0], *pages.shape[1:])
        return jax.ShapeDtypeStruct(shape, pages.dtype, sharding=self.layout.sharding("PYKH"))

    def replicate(self, array: np.ndarray) -> jax.Array:
        """Puts an array of the host on every device of the mesh, to be given to many steps."""
        if self.layout is None:
            return jax.device_put(array)
        sharding = NamedSharding(self.layout.mesh, _REPLICATED)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def compile_walk(
        self,
        pages: jax.ShapeDtypeStruct,
        inputs: StepInputs,
        num_drawn: int,
        stacks: BlockStacks | None = None,
    ) -> tuple[Compiled, Compiled, Compiled, Compiled | None]:
        """Compiles `embed`, `block`, `pick` and `adapted_block` for the shapes of these inputs.

        `num_drawn` is the length of `Sampled.tokens`. `stacks` are shapes; without them there is no
        `adapted_block`.
        """

        def embed(
            rest: Arrays, batch: RaggedBatch, follows: jax.Array, drawn: Rows
        ) -> tuple[RaggedBatch, FlatHidden, Rotary]:
            batch, follows = own_group((batch, follows), self.layout)
            tokens = jnp.where(follows >= 0, drawn[jnp.maximum(follows, 0)], batch.tokens)
            batch = batch._replace(tokens=tokens)
            return batch, *self.rest_structure.module(rest).begin(batch)

        def block(
            arrays: Arrays,
            x: FlatHidden,
            rotary: Rotary,
            pages: Pages,
            batch: RaggedBatch,
            adapters: Adapters = NO_ADAPTERS,
        ) -> tuple[FlatHidden, Pages]:
            batch = with_scalar_counts(batch, self.layout)
            if adapters.slots is not None:
                adapters = adapters._replace(slots=own_group(adapters.slots, self.layout))
            return self.block_structure.module(arrays).paged(x, rotary, pages, batch, adapters)

        def pick(x: FlatHidden, tokens: FlatTokens, last: Rows) -> tuple[DrawnHidden, Rows]:
            last = own_group(last, self.layout)
            x, tokens = x[last], tokens[last]
            if self.layout is None:
                return x, tokens
            return self.layout.gather_dimension(x, "B", 0), self.layout.gather_dimension(
                tokens, "B", 0
            )

        rows, places = self._spec("B"), self._spec("PYKH")
        embedding = self._jit(
            embed,
            (self.rest_structure.specs, _REPLICATED, _REPLICATED, _REPLICATED),
            (rows, rows, rows),
        )
        drawn = jax.ShapeDtypeStruct((num_drawn,), jnp.int32)
        given = (self.rest, inputs.batch, inputs.follows, drawn)
        batch, x, rotary = jax.eval_shape(embedding, *given)
        specs = (self.block_structure.specs, rows, rows, places, rows)
        walk = self._jit(block, specs, (rows, places), donate=(3,))
        walked = (self.blocks[0], x, rotary, pages, batch)
        adapted: Compiled | None = None
        if stacks is not None:
            slots = jax.ShapeDtypeStruct(inputs.slots.shape, jnp.int32)
            beside = Adapters(self._stack_specs(stacks), _REPLICATED)  # type: ignore[arg-type]
            with_adapters = self._jit(block, (*specs, beside), (rows, places), donate=(3,))
            adapted = with_adapters.lower(*walked, Adapters(stacks, slots)).compile()  # type: ignore[arg-type]
        picking = self._jit(pick, (rows, rows, _REPLICATED), (_REPLICATED, _REPLICATED))
        return (
            embedding.lower(*given).compile(),
            walk.lower(*walked).compile(),
            picking.lower(x, batch.tokens, inputs.last).compile(),
            adapted,
        )

    def compile_draw(
        self, inputs: StepInputs, num_drawn: int, *, has_masks: bool = True
    ) -> tuple[Compiled, Compiled | None]:
        """Compiles `draw` and `draw_masked` for as many rows as these inputs have.

        Without `has_masks` the second is None: it takes as long to compile as the first.
        """

        def draw(
            rest: Arrays,
            x: DrawnHidden,
            last: Rows,
            sampling: SamplingArrays,
            allowed: RowMasks | None = None,
        ) -> Sampled:
            model = self.rest_structure.module(rest)
            sampling = sampling._replace(history=sampling.history._replace(last=last))
            sampled = sample(model.paged_logits(model.norm.paged(x)), sampling, allowed)
            # The same width for every bucket, because a step of any size may come next.
            tokens = sampled.tokens.reshape(self.num_sequence_groups, -1)
            short = num_drawn // self.num_sequence_groups - tokens.shape[1]
            return sampled._replace(tokens=jnp.pad(tokens, ((0, 0), (0, short))).reshape(-1))

        x = jax.ShapeDtypeStruct((len(inputs.last), self.config.hidden_size), self.dtype)
        specs = (self.rest_structure.specs, _REPLICATED, _REPLICATED, _REPLICATED)
        last = jax.ShapeDtypeStruct(inputs.last.shape, jnp.int32)
        words = mask_words(self.config.vocab_size)
        allowed = jax.ShapeDtypeStruct((len(inputs.last), words), jnp.int32)
        given = (self.rest, x, last, inputs.sampling)
        plain = self._jit(draw, specs, _REPLICATED).lower(*given).compile()
        if not has_masks:
            return plain, None
        masked = self._jit(draw, (*specs, _REPLICATED), _REPLICATED)
        return plain, masked.lower(*given, allowed).compile()

    def compile_copy(self, pages: jax.ShapeDtypeStruct, max_sequences: int) -> Compiled:
        """Compiles (pages, pairs [S 2]) -> pages: copies whole pages within each group."""

        def copy(pages: Pages, pairs: PagePairs) -> Pages:
            pairs = own_group(pairs, self.layout)
            # A destination out of range is dropped.
            return pages.at[pairs[:, 1]].set(pages[pairs[:, 0]], mode="drop")

        places = self._spec("PYKH")
        program = self._jit(copy, (places, _REPLICATED), places, donate=(0,))
        pairs = jax.ShapeDtypeStruct((self.num_sequence_groups * max_sequences, 2), jnp.int32)
        return program.lower(pages, pairs).compile()

    def compile_empty(self, pages: jax.ShapeDtypeStruct) -> Compiled:
        """Compiles () -> pages: allocates one layer's pages, filled with zeros."""
        program = jax.jit(lambda: jnp.zeros(pages.shape, pages.dtype), out_shardings=pages.sharding)
        return program.lower().compile()

    def compile_put(self, stacks: BlockStacks, sizes: StackSizes) -> Compiled:
        """Compiles (stacks, slot, content) -> stacks: writes an adapter's layer into its slot.

        The slot is an argument, and `content` is as `slot_content` makes it: nothing is compiled
        when an adapter comes. The old stacks are not donated, because steps that were launched read
        them, and because a load that fails leaves them as they were.
        """

        def put(stacks: BlockStacks, slot: jax.Array, content: BlockStacks) -> BlockStacks:
            return stacks.with_slot(slot, content, self.config)

        blank = slot_content(UNCHANGED, self.config, self.placement, sizes)
        slot = jax.ShapeDtypeStruct((), jnp.int32)
        if self.layout is None:
            return jax.jit(put).lower(stacks, slot, blank).compile()
        whole = NamedSharding(self.layout.mesh, _REPLICATED)
        split = jax.tree.map(lambda stack: stack.sharding, stacks)
        program = jax.jit(put, in_shardings=(split, whole, whole), out_shardings=split)
        return program.lower(stacks, slot, blank).compile()

    def compile_no_adapters(self, stacks: BlockStacks) -> Compiled:
        """Compiles () -> stacks of one layer, all of whose slots are filled with zeros."""
        shardings = jax.tree.map(lambda stack: stack.sharding, stacks)

        def zeros() -> BlockStacks:
            made: BlockStacks = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stacks)
            return made

        return jax.jit(zeros, out_shardings=shardings).lower().compile()

    def _stack_specs(self, stacks: BlockStacks) -> Any:
        if self.layout is None:
            return _REPLICATED
        return stacks.specs(self.config, self.placement)

    def _spec(self, letters: str) -> PartitionSpec:
        return _REPLICATED if self.layout is None else self.layout.rules.spec(letters)

    def _jit(
        self, function: Callable[..., Any], given: Any, out: Any, donate: tuple[int, ...] = ()
    ) -> Any:
        """Returns jax.jit of a function, under a mesh of each device's parts of its arguments.

        `given` and `out` are specs as jax.shard_map takes them.
        """
        if self.layout is None:
            return jax.jit(function, donate_argnums=donate)
        mesh = self.layout.mesh
        # Kernels do not say over which axes their results vary, so nothing can check it.
        mapped = jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=out, check_vma=False)
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            given,
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )
        return jax.jit(mapped, in_shardings=shardings, donate_argnums=donate)


def own_group(arrays: Any, layout: Layout | None) -> Any:
    """Cuts this device's sequence group out of arrays that hold all groups.

    The host gives all groups to all devices, because with several processes JAX takes arrays of the
    host only as a whole.
    """
    if layout is None or layout.num_sequence_groups == 1:
        return arrays

    def cut(whole: jax.Array) -> jax.Array:
        size = whole.shape[0] // layout.num_sequence_groups
        return jax.lax.dynamic_slice_in_dim(whole, layout.part_index("B") * size, size)

    return jax.tree.map(cut, arrays)


def with_scalar_counts(batch: RaggedBatch, layout: Layout | None) -> RaggedBatch:
    """Returns one group's batch as the model takes it: with its two counts as scalars."""
    if layout is None:
        return batch
    decodes, sequences = batch.num_decodes[0], batch.num_sequences[0]
    return batch._replace(num_decodes=decodes, num_sequences=sequences)
