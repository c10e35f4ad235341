"""Steps of every size that a caller needs, compiled before the first of them runs.

XLA compiles for fixed shapes, so a step is padded to the smallest bucket that holds its tokens.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import jax
from jax.stages import Compiled
from jax.typing import DTypeLike

from mixtral_jax.model.adapter_stack import BlockStacks, StackSizes
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.step.adapter_programs import AdapterPrograms
from mixtral_jax.step.inputs import StepInputs, StepSizes
from mixtral_jax.step.programs import (
    Ends,
    Programs,
    compile_copy,
    compile_draw,
    compile_empty,
    compile_pick,
    compile_tally,
    compile_walk,
)
from mixtral_jax.step.scores import ScorePrograms
from mixtral_jax.step.split_model import SplitModel
from mixtral_jax.step.whole_step import Kind, WholeSteps


@dataclass(frozen=True, kw_only=True)
class Steps:
    """All programs that an engine, or the plain loop, ever runs for one model."""

    pages: jax.ShapeDtypeStruct  # of each layer, all sequence groups together
    rows: Mapping[int, int]  # sequences of one group, by its tokens
    empty: Compiled  # () -> pages of a layer
    whole: WholeSteps | None  # None: a program for each layer
    buckets: Mapping[int, Programs]  # by the tokens of one group; none where there are whole steps
    copy: Compiled | None  # (pages, pairs) -> pages, which are donated; as `buckets`
    sizes: StepSizes
    groups: int | None  # sequence groups; None without a mesh
    adapters: AdapterPrograms | None = None  # None: rows have no adapters
    tally: Compiled | None = None  # (counts of each layer) -> [L E]; None: no expert is counted
    scores: ScorePrograms  # compiled when first needed

    @property
    def num_sequence_groups(self) -> int:
        """Number of groups that the mesh splits the sequences into; 1 without a mesh."""
        return self.groups or 1

    @property
    def programs(self) -> list[Compiled]:
        """All programs that are compiled by now."""
        layerwise = [program for bucket in self.buckets.values() for program in bucket.all]
        whole = [] if self.whole is None else [*self.whole.compiled.values()]
        changes = [] if self.adapters is None else [self.adapters.empty, self.adapters.put]
        programs = [self.empty, self.copy, self.tally, *layerwise, *whole, *changes]
        programs += self.scores.compiled
        return [*{id(p): p for p in programs if p is not None}.values()]

    def bucket(self, num_tokens: int, *, adapted: bool = False, masked: bool = False) -> int:
        """Returns the smallest bucket that holds so many tokens in each group.

        Args:
            num_tokens: of the group that has most.
            adapted: some row has an adapter.
            masked: the step is walked, and drawn afterwards.
        """
        if self.whole is not None:
            return self.whole.bucket(Kind(adapted, masked), num_tokens)
        return min(bucket for bucket in self.rows if bucket >= num_tokens)

    def run_bucket(self, num_rows: int) -> int:
        """Returns the smallest bucket for runs of so many rows; see `StepLauncher.run`."""
        return self.bucket(num_rows) if self.whole is None else self.whole.run_bucket(num_rows)

    def prepare_scores(self) -> None:
        """Compiles what steps with scores need, unless that has been done.

        For any thread: steps may run meanwhile. A step whose scores come before compiles it itself.
        """
        self.scores.prepare()
        if self.whole is not None:
            self.whole.compile_walks()

    def blank(
        self,
        bucket: int,
        num_sequences: int | None = None,
        *,
        with_history: bool = False,
        with_biases: bool = False,
    ) -> StepInputs:
        """Returns inputs of that bucket to be filled in; see `StepInputs.blank`.

        `num_sequences` is the number that each group has at most; None for as many as the bucket
        has room for. With fewer, no draw is computed for rows that are far from being filled.
        """
        rows = self.rows[bucket]
        fewer = () if self.whole is not None else self.buckets[bucket].fewer
        return StepInputs.blank(
            bucket,
            rows,
            self.sizes,
            self.groups,
            drawn=min((few for few in fewer if few >= (num_sequences or rows)), default=rows),
            with_history=with_history,
            with_biases=with_biases,
        )


def compile_buckets(
    model: Transformer,
    sizes: StepSizes,
    rows_of: Mapping[int, int],
    progress: Callable[[str], None] = lambda line: None,
    kv_dtype: DTypeLike | None = None,
    *,
    has_masks: bool = True,
    adapters: StackSizes | None = None,
    counts_experts: bool = False,
    is_whole: bool | None = None,
    run_steps: int = 0,
    first: Collection[int] | None = None,
) -> Steps:
    """Compiles the step of every bucket.

    Args:
        model: may be abstract, because only shapes matter.
        sizes: of one sequence group.
        rows_of: sequences by tokens, of one sequence group.
        progress: is called with a line that names what is being compiled.
        kv_dtype: of keys and values, such as int8; None for the model's own.
        has_masks: whether a row may have a mask.
        adapters: sizes of the adapters' stacks; None if no row has an adapter.
        counts_experts: whether steps count the tokens that chose each expert, of a mixture.
        is_whole: whether a step is one program; None for the devices' own form.
        run_steps: most steps of a run, which is one program then too; 0 for no runs.
        first: of whole steps, buckets that are compiled now, while `Steps.whole.compile_rest` is
            left to the caller; None for all.
    """
    split = SplitModel.of(model)
    pages = split.pages(sizes.num_pages, sizes.page_size, kv_dtype)
    groups = None if model.layout is None else split.num_sequence_groups
    stacks, changes = None, None
    if adapters is not None:
        stacks = BlockStacks.abstract(model.config, model.placement, adapters)
        changes = AdapterPrograms.compile(split, stacks, adapters)
    whole: WholeSteps | None = None
    programs: dict[int, Programs] = {}
    if model.placement.kernels.whole_step if is_whole is None else is_whole:
        whole = WholeSteps(
            split,
            pages,
            sizes,
            groups,
            dict(rows_of),
            has_masks=has_masks,
            stacks=stacks,
            counts_experts=counts_experts,
            run_steps=run_steps,
        )
        if first is None:
            whole.compile_rest(progress)
        else:
            whole.compile_first(first, progress)
    else:
        programs = _compile_layerwise(
            split,
            pages,
            {size: StepInputs.blank(size, rows, sizes, groups) for size, rows in rows_of.items()},
            split.num_sequence_groups * sizes.max_sequences,
            progress,
            has_masks=has_masks,
            stacks=stacks,
            counts_experts=counts_experts,
        )
    return Steps(
        pages=pages,
        rows=dict(rows_of),
        empty=compile_empty(pages),
        whole=whole,
        buckets=programs,
        copy=None if whole else compile_copy(split, pages, sizes.max_sequences),
        sizes=sizes,
        groups=groups,
        adapters=changes,
        tally=compile_tally(split) if counts_experts and not whole else None,
        scores=ScorePrograms(split, sorted(rows_of)),
    )


def _compile_layerwise(
    split: SplitModel,
    pages: jax.ShapeDtypeStruct,
    blank: Mapping[int, StepInputs],
    num_drawn: int,
    progress: Callable[[str], None],
    *,
    has_masks: bool,
    stacks: BlockStacks | None,
    counts_experts: bool,
) -> dict[int, Programs]:
    """Compiles the programs of each layer and around them, for the inputs of every bucket."""
    draw: dict[int, tuple[Compiled, Compiled | None]] = {}  # by rows
    made: dict[int, StepInputs] = {inputs.num_rows: inputs for inputs in blank.values()}
    programs: dict[int, Programs] = {}
    # One after the other: the compiler itself uses all cores.
    for number, (size, inputs) in enumerate(sorted(blank.items()), start=1):
        progress(f"compiling step {number} of {len(blank)}: {size} tokens")
        if inputs.num_rows not in draw:
            draw[inputs.num_rows] = compile_draw(split, inputs, num_drawn, has_masks=has_masks)
        embed, blocks, pick, adapted = compile_walk(
            split, pages, inputs, num_drawn, stacks, counts_experts=counts_experts
        )
        fewer = {
            rows: Ends(compile_pick(split, inputs.drawing(made[rows])), *draw[rows])
            for rows in made
            if rows < inputs.num_rows
        }
        programs[size] = Programs(
            embed, blocks, split.forms, pick, *draw[inputs.num_rows], adapted, fewer
        )
    return programs
