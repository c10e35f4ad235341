"""Launcher: runs compiled steps with one model's parameters and pages, arrays in and out.

The engine and the plain loop each have one. It decides nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mixtral_jax.axes import (
    DrawnHidden,
    ExpertCounts,
    FlatHidden,
    HostRowMasks,
    HostRunTokens,
    LayerCounts,
    PackedDraws,
    Pages,
    Rows,
)
from mixtral_jax.model.adapter import Adapter, BlockAdapter
from mixtral_jax.model.adapter_stack import Adapters, BlockStacks, slot_content
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.step.buckets import Steps
from mixtral_jax.step.inputs import StepInputs, host_array, mask_words
from mixtral_jax.step.packed_inputs import PackedLayout
from mixtral_jax.step.sampling import Biases
from mixtral_jax.step.scores import ScoreBlock
from mixtral_jax.step.split_model import SplitModel
from mixtral_jax.step.whole_step import Kind, WholeStep


class WalkedStep(NamedTuple):
    """A step that has been through the layers and draws no token yet. On the devices."""

    inputs: StepInputs
    hidden: DrawnHidden
    last: Rows  # last token of each row
    expert_tokens: LayerCounts | None  # [L E]; None if the steps were compiled without counts
    flat: FlatHidden  # x of all tokens, for `score`


class LaunchedStep(NamedTuple):
    """A step that the devices compute."""

    # For `unpack`; rows that draw nothing hold values without a meaning. None where no row draws.
    packed: PackedDraws | None
    expert_tokens: LayerCounts | None
    hidden: DrawnHidden | None = None  # where no row draws: to wait for the step


class LaunchedRun(NamedTuple):
    """Steps of a run that the devices compute."""

    tokens: Any  # [steps R] i32, or such an array of draws for each step; on the devices

    def read(self) -> HostRunTokens:
        """Waits for it; returns what rows drew, NO_TOKEN where logits are not finite."""
        if isinstance(self.tokens, list):
            return np.stack([packed[:, 0] for packed in jax.device_get(self.tokens)])
        return np.asarray(self.tokens)


class StepLauncher:
    """Parameters, pages, and the tokens that the last step drew. Used by one thread.

    Args:
        model: the parameters; must not be changed afterwards.
        steps: the result of `compile_buckets` for a model of the same shapes.
    """

    def __init__(self, model: Transformer, steps: Steps) -> None:
        self.steps = steps
        self._model = SplitModel.of(model)
        # By number of rows, on the devices: for steps in which no row has a history or biases.
        is_whole = steps.whole is not None
        buckets = {rows: bucket for bucket, rows in steps.rows.items()}
        self._blanks = {
            rows: _Blank.of(steps.blank(bucket), self._model, is_whole=is_whole)
            for rows, bucket in buckets.items()
        }
        adapters = steps.adapters
        # Each layer has its own; they are not lost with the pages.
        self._stacks: list[BlockStacks] = (
            [] if adapters is None else [adapters.empty() for _ in self._model.blocks]
        )
        self._layouts: dict[int, PackedLayout] = {}
        self._layers: list[Pages] = []
        self._tokens: Rows | Any = None
        self.reset()

    @property
    def vocab_size(self) -> int:
        """V of the model's logits."""
        return self._model.config.vocab_size

    def reset(self) -> None:
        """Makes new pages, filled with zeros; what the old ones held is lost."""
        self._layers.clear()  # first, because there may be no room for both
        self._layers += [self.steps.empty() for _ in self._model.blocks]
        num_drawn = self.steps.num_sequence_groups * self.steps.sizes.max_sequences
        self._tokens = np.zeros(num_drawn, np.int32)

    def is_intact(self) -> bool:
        """Waits for the devices; returns False if a step that failed took pages with it.

        A layer's pages are given to its program, which returns the new ones: when it fails in
        between, there are none.
        """
        try:
            jax.block_until_ready(self._layers)
        except RuntimeError:  # of a page that was given away, or whose program failed
            return False
        return not any(pages.is_deleted() for pages in self._layers)

    def launch(self, inputs: StepInputs, *, draws: bool = True) -> LaunchedStep:
        """Starts one step, without waiting for its draws.

        Without `draws` no row needs a token, as within a prompt, and the form of a program for each
        layer leaves out the product with the vocabulary.
        """
        if self.steps.whole is None:
            walked = self.walk(inputs)
            if not draws:
                return LaunchedStep(None, walked.expert_tokens, walked.hidden)
            return self.draw(walked)
        done = self._launch_whole(inputs, is_masked=False)
        assert done.packed is not None, "the rows of a plain step draw"
        self._tokens = done.tokens
        return LaunchedStep(done.packed, done.expert_tokens)

    def run(self, inputs: StepInputs, active: Sequence[int]) -> LaunchedRun:
        """Starts several steps of the same sequences, without waiting for what any draws.

        The token of a sequence in one of them is the one that it has drawn in the step before. Such
        steps are one program where a step is.

        Args:
            inputs: of the first step: one group, and every sequence has one token and draws.
            active: numbers of sequences, the first ones, in all steps; they do not grow.
        """
        whole = self.steps.whole
        if whole is None:
            steps = [inputs.later(np.int32(i), np.int32(n)) for i, n in enumerate(active)]
            return LaunchedRun([self.launch(step).packed for step in steps])
        counts = host_array(whole.run_steps, 0)
        counts[: len(active)] = active
        common = self._layout(inputs.num_tokens).pack(inputs)
        layers, rare = tuple(self._layers), self._rare(inputs)
        run, model = whole.run(inputs.num_tokens), self._model
        done = run(model.rest, model.blocks, layers, self._tokens, common, rare, counts)
        self._layers[:], self._tokens = done.layers, done.tokens
        return LaunchedRun(done.run)

    def walk(self, inputs: StepInputs) -> WalkedStep:
        """Starts the part of a step that goes through the layers and writes pages."""
        if self.steps.whole is not None:
            done = self._launch_whole(inputs, is_masked=True)
            assert done.hidden is not None and done.last is not None, "a walk ends before the draw"
            assert done.flat is not None, "a walk gives x of all its tokens"
            return WalkedStep(inputs, done.hidden, done.last, done.expert_tokens, done.flat)
        blank = self._blanks[inputs.num_drawn]
        assert blank.biases is not None
        inputs = inputs.with_blanks(blank.history, blank.biases)
        programs, batch = self.steps.buckets[inputs.num_tokens], inputs.batch
        rest = self._model.rest
        batch, x, rotary = programs.embed(rest, batch, inputs.follows, self._tokens)
        slots = self._model.replicate(np.asarray(inputs.slots)) if inputs.has_adapters else None
        counts: list[ExpertCounts] = []
        for i, block in enumerate(self._model.blocks):
            given, form = (block, x, rotary, self._layers[i], batch), programs.forms[i]
            if slots is None:
                x, self._layers[i], *new = programs.blocks[form](*given)
            else:
                assert programs.adapted_blocks, "no stacks were compiled"
                adapters = Adapters(self._stacks[i], slots)
                x, self._layers[i], *new = programs.adapted_blocks[form](*given, adapters)
            counts += new
        pick = programs.ends(inputs.num_drawn).pick
        hidden, last = pick(x, batch.tokens, inputs.last)
        tally = self.steps.tally
        counted = None if tally is None else tally(tuple(counts))
        return WalkedStep(inputs, hidden, last, counted, x)

    def draw(self, walked: WalkedStep, allowed: HostRowMasks | None = None) -> LaunchedStep:
        """Starts the other part, in which each row draws its token.

        Args:
            walked: the step.
            allowed: which tokens each row may draw, as `sample` reads it, all groups one behind
                the other; None where every row may draw any.
        """
        inputs = walked.inputs
        given = (self._model.rest, walked.hidden, walked.last)
        if self.steps.whole is not None:
            if allowed is None:
                words = mask_words(self.vocab_size)
                allowed = host_array((len(inputs.last), words), -1)
            layout = self._layout(inputs.num_tokens)
            draw = self.steps.whole.draw(inputs.num_rows)
            drawing = layout.pack_drawing(inputs)
            sampled = draw(*given, drawing, self._rare(inputs), allowed)
        else:
            ends = self.steps.buckets[inputs.num_tokens].ends(inputs.num_drawn)
            if allowed is None:
                sampled = ends.draw(*given, inputs.sampling)
            else:
                assert ends.draw_masked is not None, "the steps were compiled without masks"
                sampled = ends.draw_masked(*given, inputs.sampling, allowed)
        self._tokens = sampled.tokens
        return LaunchedStep(sampled.packed, walked.expert_tokens)

    def score(self, walked: WalkedStep, blocks: Sequence[ScoreBlock]) -> list[PackedDraws]:
        """Starts the scores of a step, before or after its draw; see scores.py."""
        programs, bucket = self.steps.scores, walked.inputs.num_tokens
        return [
            programs.score(
                self._model.rest,
                programs.pick(bucket)(walked.flat, block.places),
                block.targets,
                block.asked,
            )
            for block in blocks
        ]

    def _launch_whole(self, inputs: StepInputs, *, is_masked: bool) -> WholeStep:
        whole, model = self.steps.whole, self._model
        assert whole is not None
        kind = Kind(inputs.has_adapters, is_masked)
        common = self._layout(inputs.num_tokens).pack(inputs)
        given = [tuple(self._layers), self._tokens, common, self._rare(inputs)]
        if kind.adapted:
            given.append(tuple(self._stacks))
        done: WholeStep = whole.step(kind, inputs.num_tokens)(model.rest, model.blocks, *given)
        self._layers[:] = done.layers
        return done

    def _layout(self, bucket: int) -> PackedLayout:
        assert self.steps.whole is not None
        if bucket not in self._layouts:
            self._layouts[bucket] = self.steps.whole.layout(bucket)
        return self._layouts[bucket]

    def _rare(self, inputs: StepInputs) -> Any:
        if inputs.has_history or inputs.has_biases:
            return self._layout(inputs.num_tokens).pack_rare(inputs)
        return self._blanks[inputs.num_rows].rare

    def put_adapter(self, slot: int, adapter: Adapter) -> None:
        """Writes an adapter into a slot, for the steps that are launched from now on.

        Its scaling is folded into B; its targets and its rank are among those of the stacks. What
        it raises leaves the other slots as they were.
        """
        for layer, block in enumerate(adapter.layers):
            self.put_layer(slot, layer, block)

    def put_layer(self, slot: int, layer: int, block: BlockAdapter) -> None:
        """Writes one layer of an adapter into a slot; see `put_adapter`."""
        adapters, model = self.steps.adapters, self._model
        assert adapters is not None, "no stacks were compiled"
        content = slot_content(block, model.config, model.placement, adapters.sizes)
        self._stacks[layer] = adapters.put(self._stacks[layer], np.int32(slot), content)

    def copy_pages(self, copies: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Copies pages before the next step writes: (source, destination) pairs by group."""
        width, pages = self.steps.sizes.max_sequences, self.steps.sizes.num_pages
        for start in range(0, max(map(len, copies)), width):
            # Pairs that are not filled in have a destination out of range and copy nothing.
            pairs = host_array((len(copies), width, 2), pages)
            for group, wanted in enumerate(copies):
                now = wanted[start : start + width]
                pairs[group, : len(now)] = np.reshape(now, (-1, 2))
            if self.steps.whole is not None:
                self._layers[:] = self.steps.whole.copy(tuple(self._layers), pairs.reshape(-1, 2))
                continue
            assert self.steps.copy is not None
            for i, layer in enumerate(self._layers):
                self._layers[i] = self.steps.copy(layer, pairs.reshape(-1, 2))


class _Blank(NamedTuple):
    """Stands in for histories and biases, which most steps do without. On the devices.

    It is as wide as the context for every row, so only what the form of the steps takes is made.
    """

    history: Any = None
    biases: Biases | None = None
    rare: Any = None  # the two of them, laid out for the program of a whole step

    @classmethod
    def of(cls, inputs: StepInputs, model: SplitModel, *, is_whole: bool) -> "_Blank":
        history, biases = inputs.sampling.history.tokens, inputs.sampling.biases
        put = model.replicate
        if is_whole:
            return cls(rare=put(PackedLayout(inputs).pack_rare(inputs)))
        arrays = (put(np.asarray(array)) for array in biases)
        return cls(put(np.asarray(history)), Biases(*arrays))
