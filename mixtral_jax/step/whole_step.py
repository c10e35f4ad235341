"""One program for a whole step: the form for TPU and GPU.

    step    embed, all layers, pick and draw: the pages are donated, the draws come back
    walk    the same up to where the rows draw, for steps in which some row has a mask
    draw    the rest of those, under the masks
    copy    whole pages, in all layers
    run     several steps, each of which computes what the one before has drawn

`step` and `walk` each have a twin for steps in which some row has an adapter. The host launches one
program a step, gives it one array (a second where some row has a history or biases, see
packed_inputs.py) and reads one back. Launched layer by layer, the programs of a step keep the host
busier than an accelerator is with it, and no operation overlaps with those of the next layer.

Compiling takes the longer the deeper the model is, so an engine does not wait for all programs: a
step takes the smallest bucket that is compiled, and `compile_rest` compiles the others beside it.
Layers are not scanned over: checkpoints hold each layer's arrays by themselves, and stacks of them
would need room for both at the start.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.stages import Compiled, Lowered

from mixtral_jax.axes import (
    DrawnHidden,
    FlatHidden,
    LayerCounts,
    PackedDraws,
    PagePairs,
    Pages,
    RowMasks,
    Rows,
    RunTokens,
)
from mixtral_jax.model.adapter_stack import NO_ADAPTERS, Adapters, BlockStacks
from mixtral_jax.step.draws import NO_TOKEN
from mixtral_jax.step.functions import StepFunctions, copied
from mixtral_jax.step.inputs import StepInputs, StepSizes, mask_words
from mixtral_jax.step.packed_inputs import PackedLayout
from mixtral_jax.step.sampling import Sampled
from mixtral_jax.step.split_model import REPLICATED, Arrays, SplitModel

Layers = tuple[Pages, ...]


class Kind(NamedTuple):
    """A kind of step: whether rows may have adapters, and whether it ends before its rows draw."""

    adapted: bool = False
    masked: bool = False


# A step of a bucket; "draw" of so many rows of a group; "copy"; "run" of a bucket.
Key = tuple[Kind | str, int]


class WholeStep(NamedTuple):
    """Results of a step, or of a walk, which has no draws yet. On the devices."""

    layers: Layers  # the pages, written in place
    hidden: DrawnHidden | None = None
    last: Rows | None = None  # last token of each row
    tokens: Rows | None = None  # drawn, for the next step
    packed: PackedDraws | None = None  # drawn, for the host
    expert_tokens: LayerCounts | None = None  # [L E] where experts are counted
    flat: FlatHidden | None = None  # of a walk: x of all tokens, for scores
    run: RunTokens | None = None  # of a run: what each of its steps has drawn


@dataclass(frozen=True, eq=False)
class WholeFunctions:
    """The functions that are compiled, for the inputs of one bucket."""

    functions: StepFunctions
    layout: PackedLayout

    def walk(
        self,
        rest: Arrays,
        blocks: tuple[Arrays, ...],
        layers: Layers,
        drawn: Rows,
        common: jax.Array,
        rare: jax.Array,
        stacks: tuple[BlockStacks, ...] = (),
    ) -> WholeStep:
        """Goes through the layers; `stacks` are those of each, and none without adapters."""
        inputs = self.layout.unpack(common, rare)
        return self._walk(rest, blocks, layers, drawn, inputs, stacks)

    def _walk(
        self,
        rest: Arrays,
        blocks: tuple[Arrays, ...],
        layers: Layers,
        drawn: Rows,
        inputs: StepInputs,
        stacks: tuple[BlockStacks, ...] = (),
    ) -> WholeStep:
        step = self.functions
        with jax.named_scope("embed"):
            batch, x, rotary = step.embed(rest, inputs.batch, inputs.follows, drawn)
        written, counts, forms = [], [], step.split.forms
        for i, block in enumerate(blocks):
            adapters = Adapters(stacks[i], inputs.slots) if stacks else NO_ADAPTERS
            with jax.named_scope(f"layer.{i}"):
                x, pages, *counted = step.block(
                    forms[i], block, x, rotary, layers[i], batch, adapters
                )
            written.append(pages)
            counts += counted
        with jax.named_scope("pick"):
            hidden, last = step.pick(x, batch.tokens, inputs.last)
        tally = step.tally(tuple(counts)) if counts else None
        return WholeStep(tuple(written), hidden, last, expert_tokens=tally, flat=x)

    def step(
        self,
        rest: Arrays,
        blocks: tuple[Arrays, ...],
        layers: Layers,
        drawn: Rows,
        common: jax.Array,
        rare: jax.Array,
        stacks: tuple[BlockStacks, ...] = (),
    ) -> WholeStep:
        """Goes through the layers and draws."""
        walked = self.walk(rest, blocks, layers, drawn, common, rare, stacks)
        sampling = self.layout.unpack_sampling(common, rare)
        assert walked.hidden is not None and walked.last is not None
        with jax.named_scope("draw"):
            sampled = self.functions.draw(rest, walked.hidden, walked.last, sampling)
        return WholeStep(
            walked.layers,
            tokens=sampled.tokens,
            packed=sampled.packed,
            expert_tokens=walked.expert_tokens,
        )

    def run(
        self,
        rest: Arrays,
        blocks: tuple[Arrays, ...],
        layers: Layers,
        drawn: Rows,
        common: jax.Array,
        rare: jax.Array,
        active: jax.Array,
    ) -> WholeStep:
        """Takes a step for each number of `active` that is not 0; see `StepLauncher.run`."""
        inputs = self.layout.unpack(common, rare)

        def step(number: jax.Array, carry: Any) -> Any:
            layers, drawn, run = carry
            now = inputs.later(number, active[number])
            walked = self._walk(rest, blocks, layers, drawn, now)
            assert walked.hidden is not None and walked.last is not None
            sampled = self.functions.draw(rest, walked.hidden, walked.last, now.sampling)
            return walked.layers, sampled.tokens, run.at[number].set(sampled.packed[:, 0])

        run = jnp.full((active.shape[0], inputs.last.shape[0]), NO_TOKEN, jnp.int32)
        steps = jnp.sum(active > 0, dtype=jnp.int32)
        layers, drawn, run = jax.lax.fori_loop(0, steps, step, (layers, drawn, run))
        return WholeStep(layers, tokens=drawn, run=run)

    def draw(
        self,
        rest: Arrays,
        hidden: DrawnHidden,
        last: Rows,
        drawing: jax.Array,
        rare: jax.Array,
        allowed: RowMasks,
    ) -> Sampled:
        """Draws under masks; `drawing` is the beginning of `common`."""
        sampling = self.layout.unpack_sampling(drawing, rare)
        with jax.named_scope("draw"):
            return self.functions.draw(rest, hidden, last, sampling, allowed)


class WholeSteps:
    """The programs of one model's whole steps.

    Args:
        split: the model; may be abstract.
        pages: of each layer.
        sizes: of one sequence group.
        groups: sequence groups; None without a mesh.
        rows: sequences of one group by its tokens, for every bucket.
        has_masks: whether a row may have a mask.
        stacks: shapes of a layer's stacks; None if no row has an adapter.
        counts_experts: whether steps count the tokens that chose each expert.
        run_steps: most steps of a run; 0 for no runs.
    """

    def __init__(
        self,
        split: SplitModel,
        pages: jax.ShapeDtypeStruct,
        sizes: StepSizes,
        groups: int | None,
        rows: Mapping[int, int],
        *,
        has_masks: bool = True,
        stacks: BlockStacks | None = None,
        counts_experts: bool = False,
        run_steps: int = 0,
    ) -> None:
        self.run_steps = run_steps
        self._split, self._pages, self._sizes, self._groups = split, pages, sizes, groups
        self._rows, self._stacks = rows, stacks
        num_drawn = split.num_sequence_groups * sizes.max_sequences
        self._functions = StepFunctions(split, num_drawn, counts_experts)
        adapted = (False,) if stacks is None else (False, True)
        masked = (False, True) if has_masks else (False,)
        self._kinds = [Kind(a, m) for m in masked for a in adapted]
        self._compiled: dict[Key, Compiled] = {}

    @property
    def compiled(self) -> Mapping[Key, Compiled]:
        """The programs that are compiled by now."""
        return dict(self._compiled)

    def bucket(self, kind: Kind, num_tokens: int) -> int:
        """Returns the smallest bucket that holds so many tokens and whose programs are compiled."""
        compiled = self.compiled
        sizes = [size for own, size in compiled if own == kind and size >= num_tokens]
        if kind.masked:
            sizes = [size for size in sizes if ("draw", self._rows[size]) in compiled]
        return min(sizes)

    def run_bucket(self, num_rows: int) -> int:
        """Returns the smallest bucket for runs of so many rows whose program is compiled."""
        sizes = [size for kind, size in self.compiled if kind == "run" and size >= num_rows]
        return min(sizes)

    def layout(self, bucket: int) -> PackedLayout:
        """Returns how the inputs of a bucket are laid out."""
        blank = StepInputs.blank(bucket, self._rows[bucket], self._sizes, self._groups)
        return PackedLayout(blank)

    def step(self, kind: Kind, bucket: int) -> Compiled:
        """Returns the program of `WholeFunctions.step`, or of `walk` for a masked kind."""
        return self._compiled[kind, bucket]

    def draw(self, rows: int) -> Compiled:
        """Returns the program of `WholeFunctions.draw` for so many rows of a group."""
        return self._compiled["draw", rows]

    def run(self, bucket: int) -> Compiled:
        """Returns the program of `WholeFunctions.run`."""
        return self._compiled["run", bucket]

    @property
    def copy(self) -> Compiled:
        """The program (layers, pairs [S 2]) -> layers, which are donated."""
        return self._compiled["copy", 0]

    @property
    def missing(self) -> list[Key]:
        """The programs that are not compiled by now, draws before the steps that need them."""
        sizes = sorted(self._rows, reverse=True)
        steps: list[Key] = [(kind, size) for kind in self._kinds for size in sizes]
        keys = [("copy", 0), *self._draws(sizes), *steps, *self._runs()]
        return [key for key in keys if key not in self._compiled]

    def compile_first(self, few: Collection[int], progress: Callable[[str], None]) -> None:
        """Compiles all that any step needs: plain steps of a few buckets, others of the largest.

        Args:
            few: some of the buckets.
            progress: is called with a line for each program.
        """
        largest = max(self._rows)
        keys: list[Key] = [(kind, largest) for kind in self._kinds]
        keys += [(Kind(), size) for size in sorted(few, reverse=True) if size != largest]
        keys += self._runs()
        # Several at once: each of them keeps a core or two busy.
        self._compile([("copy", 0), *self._draws([largest]), *keys], progress, _half_the_cores())

    def compile_rest(
        self,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Compiles what is missing; `progress` is called with a line for each program."""
        self._compile(self.missing, progress, _half_the_cores())

    def compile_walks(self) -> None:
        """Compiles the largest steps that are walked and their draw, unless they are there.

        Scores need them (scores.py) also where no row has a mask.
        """
        largest = max(self._rows)
        walks: list[Key] = [(Kind(kind.adapted, True), largest) for kind in self._kinds]
        for key in [("draw", self._rows[largest]), *walks]:
            if key not in self._compiled:
                self.compile_one(key)

    def compile_one(self, key: Key) -> None:
        """Compiles a program; steps may run meanwhile. Raises what the compiler raises."""
        self._compiled[key] = self.lowered(key).compile()

    def _runs(self) -> list[Key]:
        """The runs of all buckets that are no larger than all rows need."""
        if not self.run_steps:
            return []
        enough = min(size for size in self._rows if size >= self._sizes.max_sequences)
        return [("run", size) for size in sorted(self._rows) if size <= enough]

    def _draws(self, sizes: Iterable[int]) -> list[Key]:
        """The draws that masked steps of these buckets need."""
        rows = {self._rows[size] for size in sizes}
        return [("draw", count) for count in sorted(rows)] if self._kinds[-1].masked else []

    def _compile(self, keys: Sequence[Key], progress: Callable[[str], None], workers: int) -> None:
        pool = ThreadPoolExecutor(workers)
        try:
            waiting = [pool.submit(lambda key: self.lowered(key).compile(), key) for key in keys]
            for number, (key, program) in enumerate(zip(keys, waiting, strict=True), start=1):
                progress(f"compiling program {number} of {len(keys)}: {_name(key)}")
                self._compiled[key] = program.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def lowered(self, key: Key) -> Lowered:
        """Traces a program."""
        kind, size = key
        if isinstance(kind, Kind):
            return self._lowered_step(kind, size)
        if kind == "run":
            return self._lowered_step(Kind(), size, is_run=True)
        return self._lowered_copy() if kind == "copy" else self._lowered_draw(size)

    def _lowered_step(self, kind: Kind, bucket: int, *, is_run: bool = False) -> Lowered:
        split, layout = self._split, self.layout(bucket)
        num_layers, places = len(split.blocks), split.spec("PYKH")
        specs: list[Any] = [
            split.rest_structure.specs,
            tuple(split.block_structures[form].specs for form in split.forms),
            (places,) * num_layers,
            *(REPLICATED,) * 3,
        ]
        given: list[Any] = [
            split.rest,
            split.blocks,
            (self._pages,) * num_layers,
            jax.ShapeDtypeStruct((self._functions.num_drawn,), jnp.int32),
            layout.pack(layout.like),
            layout.pack_rare(layout.like),
        ]
        if kind.adapted:
            assert self._stacks is not None
            specs.append((split.stack_specs(self._stacks),) * num_layers)
            given.append((self._stacks,) * num_layers)
        if is_run:
            specs.append(REPLICATED)
            given.append(jax.ShapeDtypeStruct((self.run_steps,), jnp.int32))
        functions = WholeFunctions(self._functions, layout)
        # Each spec stands for a result that the program may not have.
        results: Any = (places,) * num_layers, *(REPLICATED,) * 5, split.spec("B"), REPLICATED
        out: Any = WholeStep(*results)
        program: Any = functions.walk if kind.masked else functions.step
        program = functions.run if is_run else program
        lowered: Lowered = split.jit(program, tuple(specs), out, donate=(2,)).lower(*given)
        return lowered

    def _lowered_draw(self, rows: int) -> Lowered:
        split = self._split
        layout = self.layout(next(size for size, own in self._rows.items() if own == rows))
        all_rows = len(layout.like.last)
        words = mask_words(split.config.vocab_size)
        specs = (split.rest_structure.specs, *(REPLICATED,) * 5)
        program = split.jit(WholeFunctions(self._functions, layout).draw, specs, REPLICATED)
        lowered: Lowered = program.lower(
            split.rest,
            jax.ShapeDtypeStruct((all_rows, split.config.hidden_size), split.dtype),
            jax.ShapeDtypeStruct((all_rows,), jnp.int32),
            layout.pack_drawing(layout.like),
            layout.pack_rare(layout.like),
            jax.ShapeDtypeStruct((all_rows, words), jnp.int32),
        )
        return lowered

    def _lowered_copy(self) -> Lowered:
        split = self._split

        def copy(layers: Layers, pairs: PagePairs) -> Layers:
            return tuple(copied(pages, pairs, split.layout) for pages in layers)

        places = (split.spec("PYKH"),) * len(split.blocks)
        program = split.jit(copy, (places, REPLICATED), places, donate=(0,))
        pairs = jax.ShapeDtypeStruct((self._functions.num_drawn, 2), jnp.int32)
        lowered: Lowered = program.lower((self._pages,) * len(split.blocks), pairs)
        return lowered


def _half_the_cores() -> int:
    return max(1, (os.cpu_count() or 1) // 2)


def _name(key: Key) -> str:
    """The program's name for a reader of the log."""
    kind, size = key
    if kind == "copy":
        return "the copy of pages"
    if kind == "run":
        return f"a run of steps of {size} sequences"
    if not isinstance(kind, Kind):
        return f"the draw under masks of {size} rows"
    beside = " with adapters" if kind.adapted else ""
    return f"a step of {size} tokens{beside}{', whose rows have masks' if kind.masked else ''}"
