"""The serving step as compiled programs, one set for each number of tokens; arrays in, arrays out.

XLA compiles for fixed shapes, so a step is padded to the smallest bucket that holds it. A step is a
few programs: embed, block (called once for each layer), pick and draw. All layers have the same
shapes, so one compilation serves them all and the start does not grow with the depth.

What a sequence drew goes from `draw` to the next `embed` on the device: steps can be launched
before the tokens of the last are read.

Under a mesh each program is one `shard_map`: every device runs it on its own parts of parameters
and pages, and the model writes out the collectives (`sharding.Layout`). Sequences are split into
`parts`, each with a flat row and pages of its own; the arrays of all parts stand one behind the
other. What is drawn, every device knows.

Nothing is needed but shapes: the same programs are compiled for hardware that is elsewhere
(plan.py).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mixtral_jax.axes import DrawnHidden, FlatHidden, Pages, Rows
from mixtral_jax.cache import PagedCache, RaggedBatch
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.layers import Rotary
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sharding import Layout
from mixtral_jax.step.sampling import NO_ID, Biases, History, Sampled, SamplingArrays, sample

Arrays = tuple[Any, ...]  # jax.Array, or ShapeDtypeStruct where programs are only compiled
_WHOLE = PartitionSpec()


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """What fixes the shapes; all of one part of the sequences."""

    num_pages: int
    page_size: int
    max_sequences: int
    max_context: int  # tokens of one sequence
    max_biases: int  # of one sequence


class StepInputs(NamedTuple):
    """One step, from the host: numpy arrays that are filled in before a launch.

    With several parts the arrays of `batch` and `follows` and `last` hold one part behind the
    other; `num_decodes` and `num_sequences` then have an element for each.
    """

    batch: RaggedBatch
    follows: Any  # [T] i32, which of the step before's `tokens` it is, or -1
    last: Any  # [R] i32, place of each sequence's last token in its part's flat row
    sampling: SamplingArrays

    @classmethod
    def blank(cls, tokens: int, rows: int, sizes: StepSizes, parts: int | None) -> "StepInputs":
        """For so many tokens and sequences of each part; without `parts`, for no mesh."""
        count = parts or 1
        all_rows = count * rows
        batch = RaggedBatch(
            tokens=full(count * tokens, 0),
            positions=full(count * tokens, 0),
            lengths=full(all_rows, 0),
            query_starts=full(count * (rows + 1), 0),
            page_table=full((all_rows, -(-sizes.max_context // sizes.page_size)), 0),
            num_decodes=full(() if parts is None else parts, 0),
            num_sequences=full(() if parts is None else parts, 0),
        )
        zeros, ones = full(all_rows, 0, np.float32), full(all_rows, 1, np.float32)
        sampling = SamplingArrays(
            temperature=zeros,
            top_k=full(all_rows, 0),
            top_p=ones,
            min_p=zeros.copy(),
            presence_penalty=zeros.copy(),
            frequency_penalty=zeros.copy(),
            repetition_penalty=ones.copy(),
            seed=full(all_rows, 0),
            position=full(all_rows, 0),
            top_logprobs=full(all_rows, -1),
            history=History(
                tokens=_no_history(all_rows, sizes.max_context),
                last=full(all_rows, 0),  # known on the device alone
                prompt_length=full(all_rows, 0),
            ),
            biases=Biases(
                ids=full((all_rows, sizes.max_biases), NO_ID),
                values=full((all_rows, sizes.max_biases), 0, np.float32),
            ),
        )
        return cls(batch, full(count * tokens, -1), full(all_rows, 0), sampling)

    def with_history(self, tokens: Any) -> "StepInputs":
        """The same with other tokens of the history: those of `blank` are not to be written to."""
        history = self.sampling.history._replace(tokens=tokens)
        return self._replace(sampling=self.sampling._replace(history=history))


@functools.cache
def _no_history(rows: int, width: int) -> Any:
    """What most steps send: megabytes for a long context, so made once. Never written to."""
    return full((rows, width), NO_ID)


def full(shape: int | tuple[int, ...], value: int, dtype: type = np.int32) -> Any:
    """An array on the host, as compiled programs take it."""
    return np.full(shape, value, dtype)


@dataclass(frozen=True)
class Programs:
    """Compiled for one bucket."""

    embed: Any  # (rest, batch, follows, tokens) -> batch with its tokens, x, rotary
    block: Any  # (block, x, rotary, pages, batch) -> x, pages; pages are donated
    pick: Any  # (x, tokens, last) -> x and tokens of the rows that draw
    draw: Any  # (rest, x, last tokens, sampling) -> Sampled


class Piece(NamedTuple):
    """A module without its arrays; equal ones share compilations."""

    graph: Any
    structure: Any
    specs: tuple[PartitionSpec, ...]  # of its arrays

    @classmethod
    def of(cls, module: nnx.Module, layout: Layout | None) -> tuple["Piece", Arrays]:
        """The piece, and the arrays, flat: flattening an nnx.State on every call costs more than
        the call."""
        graph, state = nnx.split(module)
        arrays, structure = jax.tree.flatten(state)
        variables = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
        specs = [
            _WHOLE if layout is None else layout.rules.spec(variable.get_metadata("axes"))
            for variable in variables
        ]
        return cls(graph, structure, tuple(specs)), tuple(arrays)

    def module(self, arrays: Arrays) -> Any:
        return nnx.merge(self.graph, jax.tree.unflatten(self.structure, arrays))


@dataclass(frozen=True)
class Parts:
    """A Transformer taken apart: each block's arrays, and the arrays of the rest."""

    blocks: tuple[Arrays, ...]
    rest: Arrays
    block_piece: Piece
    rest_piece: Piece
    layout: Layout | None
    config: ModelConfig
    dtype: Any  # between the blocks

    @classmethod
    def of(cls, model: Transformer) -> "Parts":
        layers, around = model.apart()
        blocks = [Piece.of(block, model.layout) for block in layers]
        rest_piece, rest = Piece.of(around, model.layout)
        return cls(
            blocks=tuple(arrays for _, arrays in blocks),
            rest=rest,
            block_piece=blocks[0][0],
            rest_piece=rest_piece,
            layout=model.layout,
            config=model.config,
            dtype=model.dtype,
        )

    def pages(self, num_pages: int, page_size: int, dtype: DTypeLike | None = None) -> Any:
        """Shape and place of each layer's pages, so many in each part; of the model's own dtype
        unless another is given, such as int8."""
        kind = self.dtype if dtype is None else dtype
        one = jax.eval_shape(
            lambda: PagedCache.empty(self.config, num_pages, page_size, kind)
        ).layers[0]
        if self.layout is None:
            return one
        shape = (self.num_parts * one.shape[0], *one.shape[1:])
        return jax.ShapeDtypeStruct(shape, one.dtype, sharding=self.layout.sharding("PYKH"))

    def everywhere(self, array: Any) -> Any:
        """An array of the host on every device of the mesh, to be given to many steps."""
        if self.layout is None:
            return array
        sharding = NamedSharding(self.layout.mesh, _WHOLE)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def empty(self, pages: Any) -> list[Pages]:
        """Such pages for every layer."""
        make = jax.jit(lambda: jnp.zeros(pages.shape, pages.dtype), out_shardings=pages.sharding)
        return [make() for _ in self.blocks]

    def compile_walk(self, pages: Any, inputs: StepInputs, num_drawn: int) -> tuple[Any, Any, Any]:
        """The programs `embed`, `block` and `pick` for the shapes of these inputs.

        `num_drawn` is the length of `Sampled.tokens`.
        """

        def embed(
            rest: Arrays, batch: RaggedBatch, follows: jax.Array, drawn: Rows
        ) -> tuple[RaggedBatch, jax.Array, Rotary]:
            batch, follows = part((batch, follows), self.layout)
            tokens = jnp.where(follows >= 0, drawn[jnp.maximum(follows, 0)], batch.tokens)
            batch = batch._replace(tokens=tokens)
            return batch, *self.rest_piece.module(rest).begin(batch)

        def block(
            arrays: Arrays,
            x: FlatHidden,
            rotary: Rotary,
            pages: Pages,
            batch: RaggedBatch,
        ) -> tuple[FlatHidden, Pages]:
            return self.block_piece.module(arrays).paged(x, rotary, pages, own(batch, self.layout))

        def pick(x: jax.Array, tokens: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
            last = part(last, self.layout)
            x, tokens = x[last], tokens[last]
            if self.layout is None:
                return x, tokens
            return self.layout.whole(x, "B", 0), self.layout.whole(tokens, "B", 0)

        rows, places = self._spec("B"), self._spec("PYKH")
        embedding = self._jit(
            embed, (self.rest_piece.specs, _WHOLE, _WHOLE, _WHOLE), (rows, rows, rows)
        )
        drawn = jax.ShapeDtypeStruct((num_drawn,), jnp.int32)
        given = (self.rest, inputs.batch, inputs.follows, drawn)
        batch, x, rotary = jax.eval_shape(embedding, *given)
        walk = self._jit(
            block, (self.block_piece.specs, rows, rows, places, rows), (rows, places), donate=(3,)
        )
        picking = self._jit(pick, (rows, rows, _WHOLE), (_WHOLE, _WHOLE))
        return (
            embedding.lower(*given).compile(),
            walk.lower(self.blocks[0], x, rotary, pages, batch).compile(),
            picking.lower(x, batch.tokens, inputs.last).compile(),
        )

    def compile_draw(self, inputs: StepInputs, num_drawn: int) -> Any:
        """The program `draw` for as many rows as these inputs have."""

        def draw(rest: Arrays, x: DrawnHidden, last: Rows, sampling: SamplingArrays) -> Sampled:
            model = self.rest_piece.module(rest)
            sampling = sampling._replace(history=sampling.history._replace(last=last))
            sampled = sample(model.paged_logits(model.norm.paged(x)), sampling)
            # As wide for every bucket: any of them may come next.
            tokens = sampled.tokens.reshape(self.num_parts, -1)
            short = num_drawn // self.num_parts - tokens.shape[1]
            return sampled._replace(tokens=jnp.pad(tokens, ((0, 0), (0, short))).reshape(-1))

        x = jax.ShapeDtypeStruct((len(inputs.last), self.config.hidden_size), self.dtype)
        program = self._jit(draw, (self.rest_piece.specs, _WHOLE, _WHOLE, _WHOLE), _WHOLE)
        last = jax.ShapeDtypeStruct(inputs.last.shape, jnp.int32)
        return program.lower(self.rest, x, last, inputs.sampling).compile()

    def compile_copy(self, pages: Any, max_sequences: int) -> Any:
        """(pages, pairs [S 2]) -> pages: copies whole pages, each part its own."""

        def copy(pages: Pages, pairs: jax.Array) -> Pages:
            pairs = part(pairs, self.layout)
            # A destination out of range is dropped.
            return pages.at[pairs[:, 1]].set(pages[pairs[:, 0]], mode="drop")

        places = self._spec("PYKH")
        program = self._jit(copy, (places, _WHOLE), places, donate=(0,))
        pairs = jax.ShapeDtypeStruct((self.num_parts * max_sequences, 2), jnp.int32)
        return program.lower(pages, pairs).compile()

    @property
    def num_parts(self) -> int:
        return 1 if self.layout is None else self.layout.parts

    def _spec(self, letters: str) -> PartitionSpec:
        return _WHOLE if self.layout is None else self.layout.rules.spec(letters)

    def _jit(
        self, function: Callable[..., Any], given: Any, out: Any, donate: tuple[int, ...] = ()
    ) -> Any:
        return jit(function, self.layout, given, out, donate)


def part(arrays: Any, layout: Layout | None) -> Any:
    """A device's part of arrays of the host, which hold all parts one behind the other.

    With several processes JAX takes arrays of the host only whole.
    """
    if layout is None or layout.parts == 1:
        return arrays

    def cut(whole: jax.Array) -> jax.Array:
        size = whole.shape[0] // layout.parts
        return jax.lax.dynamic_slice_in_dim(whole, layout.index("B") * size, size)

    return jax.tree.map(cut, arrays)


def own(batch: RaggedBatch, layout: Layout | None) -> RaggedBatch:
    """A device's part of the batch, as the model takes it."""
    if layout is None:
        return batch
    decodes, sequences = batch.num_decodes[0], batch.num_sequences[0]
    return batch._replace(num_decodes=decodes, num_sequences=sequences)


def jit(
    function: Callable[..., Any],
    layout: Layout | None,
    given: Any,
    out: Any,
    donate: tuple[int, ...] = (),
) -> Any:
    """jax.jit, under a mesh of the function on each device's parts of its arguments.

    `given` and `out` are specs as jax.shard_map takes them.
    """
    if layout is None:
        return jax.jit(function, donate_argnums=donate)
    mesh = layout.mesh
    # Kernels do not say over which axes their results vary, so nothing can check it.
    mapped = jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=out, check_vma=False)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        given,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
    return jax.jit(mapped, in_shardings=shardings, donate_argnums=donate)


@dataclass(frozen=True)
class Steps:
    """All that an engine ever runs."""

    pages: Any  # jax.ShapeDtypeStruct of each layer, of all parts together
    buckets: dict[int, Programs]  # by the tokens of one part
    copy: Any  # (pages, pairs) -> pages; pages are donated
    sizes: StepSizes
    parts: int | None  # None without a mesh

    @property
    def num_parts(self) -> int:
        return self.parts or 1

    def blank(self, bucket: int, rows: int) -> StepInputs:
        return StepInputs.blank(bucket, rows, self.sizes, self.parts)


def compile_buckets(
    model: Transformer,
    sizes: StepSizes,
    rows_of: dict[int, int],
    progress: Callable[[str], None] = lambda line: None,
    cache_dtype: DTypeLike | None = None,
) -> Steps:
    """Compiles the step of every bucket: `rows_of` has its sequences by its tokens, of one part.

    The model may be abstract: only shapes matter. `cache_dtype` is that of keys and values, such as
    int8; None for the model's own. `progress` is told in a line what is being compiled.
    """
    apart = Parts.of(model)
    pages = apart.pages(sizes.num_pages, sizes.page_size, cache_dtype)
    parts = None if model.layout is None else model.layout.parts
    num_drawn = apart.num_parts * sizes.max_sequences
    # One after the other: the compiler itself uses all cores.
    draw: dict[int, Any] = {}
    programs: dict[int, Programs] = {}
    for number, (size, rows) in enumerate(sorted(rows_of.items()), start=1):
        progress(f"compiling step {number} of {len(rows_of)}: {size} tokens")
        inputs = StepInputs.blank(size, rows, sizes, parts)
        if rows not in draw:
            draw[rows] = apart.compile_draw(inputs, num_drawn)
        programs[size] = Programs(*apart.compile_walk(pages, inputs, num_drawn), draw[rows])
    copy = apart.compile_copy(pages, sizes.max_sequences)
    return Steps(pages, programs, copy, sizes, parts)
