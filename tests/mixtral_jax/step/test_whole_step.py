"""One program for a whole step gives what a program for each layer gives."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from jax.stages import Compiled

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.model.adapter_stack import NO_SLOT, BlockStacks, StackSizes
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.sharding import copies_of, make_mesh
from mixtral_jax.step.buckets import Steps, compile_buckets
from mixtral_jax.step.draws import Draws, unpack
from mixtral_jax.step.inputs import GroupInputs, StepInputs, StepSizes
from mixtral_jax.step.launcher import StepLauncher
from mixtral_jax.step.packed_inputs import PackedLayout
from mixtral_jax.step.split_model import SplitModel
from mixtral_jax.step.whole_step import Kind, WholeSteps
from tests.support.adapters import random_adapter
from tests.support.models import model_of, split_over

MOE = replace(
    ModelConfig.tiny(vocab_size=64),
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_size=8,
    num_experts=4,
    sliding_window=None,
)
SIZES = StepSizes(num_pages=24, page_size=4, max_sequences=2, max_context=32)
SHARED = [("draw", 2), ("copy", 0)]
SETTINGS = AdapterConfig(rank=2, alpha=8.0)


def steps_of(model: Transformer, *, is_whole: bool) -> Steps:
    stacks = StackSizes(slots=1, rank=2, targets=("q", "down"))
    return compile_buckets(
        model, SIZES, {8: 2}, adapters=stacks, counts_experts=True, is_whole=is_whole
    )


class Sequences:
    """Two sequences of every group, continued step by step by a launcher."""

    def __init__(self, model: Transformer, steps: Steps) -> None:
        self.launcher, self.steps = StepLauncher(model, steps), steps
        settings = replace(SETTINGS, targets=("q", "down"))
        adapter = random_adapter(model.config, settings, seed=1, size=0.3)
        self.launcher.put_adapter(0, adapter.folded(settings))

    def inputs(
        self, bucket: int, ids: list[list[int]], start: int, slot: int, rare: bool
    ) -> StepInputs:
        """A step of new tokens; an empty list stands for the token that the step before drew."""
        inputs = self.steps.blank(bucket, with_history=rare, with_biases=rare)
        for group in range(self.steps.num_sequence_groups):
            writer = GroupInputs(inputs, group, SIZES.max_sequences)
            for row, own in enumerate(ids):
                pages = list(range(row * 8, row * 8 + 8))
                follows = None if own else row
                at = writer.add(own or [0], start, pages, follows, slot if row else NO_SLOT)
                params = SamplingParams(temperature=0.9, top_k=9, top_logprobs=5)
                if rare:
                    params = replace(params, repetition_penalty=1.7, logit_bias={7: 3.0})
                end = start + len(own or [0])
                writer.sample(
                    at,
                    params,
                    seed=row + 1,
                    position=end,
                    prompt_length=3,
                    history=[5, 6, 7] if rare else (),
                    forbidden={11} if rare else (),
                )
        return inputs

    def run(self) -> list[tuple[Draws, np.ndarray]]:
        """A prompt, a step without anything, one with adapters, and two under masks."""
        launcher, done = self.launcher, []
        launched = [launcher.launch(self.inputs(8, [[5, 6, 7], [9, 8, 1]], 0, NO_SLOT, False))]
        launched.append(launcher.launch(self.inputs(8, [[], []], 3, 0, False)))
        launched.append(launcher.launch(self.inputs(8, [[], []], 4, 0, True)))
        walked = launcher.walk(self.inputs(8, [[], []], 5, NO_SLOT, True))
        rows = self.steps.num_sequence_groups * 2
        allowed = np.full((rows, 2), -1, np.int32)
        allowed[::2] = [0, 1 << 9]  # the first row of each group may draw the id 41 alone
        launched.append(launcher.draw(walked, allowed))
        assert np.asarray(launched[-1].packed)[0, 0] == 41
        launcher.copy_pages([[(0, 20)]] * self.steps.num_sequence_groups)
        launched.append(launcher.draw(launcher.walk(self.inputs(8, [[], []], 6, 0, False))))
        for step in launched:
            assert step.expert_tokens is not None
            done.append((unpack(np.asarray(step.packed)), np.asarray(step.expert_tokens)))
        return done


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(None, "float32", id="alone", marks=pytest.mark.soak),
        pytest.param((2, 2, 2), "float32", id="mesh"),
        pytest.param(None, "int4", id="layers of two forms", marks=pytest.mark.slow),
    ],
)
def test_both_forms_of_a_step_draw_the_same(shape: tuple[int, int, int] | None, dtype: str) -> None:
    if dtype == "int4":
        config = replace(MOE, hidden_size=64, head_size=32)
        model = model_of(config, dtype, weight_dtypes=(("layers.1.feed_forward.down", "int8"),))
    else:
        model = model_of(MOE)
    if shape is not None:
        mesh = make_mesh(*shape, copies=copies_of(MOE, shape[1], shape[2], False))
        model = split_over(model, mesh)
    layerwise = Sequences(model, steps_of(model, is_whole=False))
    whole = Sequences(model, steps_of(model, is_whole=True))
    for (want, counts), (got, same) in zip(layerwise.run(), whole.run(), strict=True):
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
        np.testing.assert_allclose(got.top_logprobs, want.top_logprobs, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(same, counts)
    for ours, theirs in zip(whole.launcher._layers, layerwise.launcher._layers, strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=1e-5)
    assert np.asarray(whole.launcher._layers[0])[20].any()  # the copy


def test_a_step_is_one_launch_with_at_most_two_arrays_of_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of(MOE)
    sequences, launches = Sequences(model, steps_of(model, is_whole=True)), list[int]()
    call: Any = Compiled.__call__

    def noted(self: Compiled, *given: Any) -> Any:
        launches.append(sum(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(given)))
        return call(self, *given)

    sequences.launcher.launch(sequences.inputs(8, [[5], [9]], 0, NO_SLOT, False))
    monkeypatch.setattr(Compiled, "__call__", noted)
    step = sequences.launcher.launch(sequences.inputs(8, [[], []], 1, NO_SLOT, False))
    assert launches == [1]
    assert isinstance(step.packed, jax.Array)  # the one array that is read back
    sequences.launcher.launch(sequences.inputs(8, [[], []], 2, 0, True))
    assert launches == [1, 2]
    walked = sequences.launcher.walk(sequences.inputs(8, [[], []], 3, NO_SLOT, False))
    sequences.launcher.draw(walked, np.full((2, 2), -1, np.int32))
    assert launches == [1, 2, 1, 2]


def test_pages_are_written_in_place_by_one_computation() -> None:
    steps = steps_of(model_of(MOE), is_whole=True)
    assert steps.whole is not None
    for kind in (Kind(), Kind(masked=True)):
        program = steps.whole.step(kind, 8)
        analysis, text = program.memory_analysis(), program.as_text()
        assert analysis is not None and text is not None
        pages = MOE.num_layers * steps.pages.size * 4
        assert analysis.alias_size_in_bytes == pages
        assert text.count("ENTRY ") == 1
        for name in ("embed", "layer.0", "layer.1", "pick"):
            assert f"/{name}/" in text, name


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> WholeSteps:
    """Steps of two buckets, of which the larger one is compiled."""
    split = SplitModel.of(model_of(MOE))
    stacks = BlockStacks.abstract(MOE, split.placement, StackSizes(slots=1, rank=2, targets=("q",)))
    steps = WholeSteps(split, split.pages(24, 4), SIZES, None, {4: 2, 8: 2}, stacks=stacks)
    monkeypatch.setattr(steps, "lowered", lambda key: jax.jit(lambda: 0).lower())
    steps.compile_first([8], lambda line: None)
    return steps


def test_a_step_takes_the_next_larger_bucket_until_its_own_is_compiled(late: WholeSteps) -> None:
    kinds = [Kind(adapted, masked) for adapted in (False, True) for masked in (False, True)]
    assert sorted(late.compiled, key=str) == sorted([*((k, 8) for k in kinds), *SHARED], key=str)
    assert [late.bucket(kind, 3) for kind in kinds] == [8] * 4
    late.compile_rest()
    assert [late.bucket(kind, 3) for kind in kinds] == [4] * 4
    assert [late.bucket(kind, 5) for kind in kinds] == [8] * 4
    assert late.missing == []


def test_inputs_come_out_of_their_rows_as_they_went_in() -> None:
    inputs = StepInputs.blank(6, 3, SIZES, groups=2, with_history=True, with_biases=True)
    dice = np.random.default_rng(0)
    for array in jax.tree.leaves(inputs):
        array[...] = dice.integers(0, 99, array.shape).astype(array.dtype) / 4
    layout = PackedLayout(StepInputs.blank(6, 3, SIZES, groups=2))
    common, rare = layout.pack(inputs), layout.pack_rare(inputs)
    assert common.ndim == rare.ndim == 1 and common.dtype == rare.dtype == np.int32
    same = jax.jit(layout.unpack)(common, rare)
    last = inputs.sampling.history._replace(last=same.sampling.history.last)
    want = inputs._replace(sampling=inputs.sampling._replace(history=last))
    jax.tree.map(np.testing.assert_array_equal, same, want)
    np.testing.assert_array_equal(layout.pack_drawing(inputs), common[: layout.num_drawing])
    drawing = jax.jit(layout.unpack_sampling)(layout.pack_drawing(inputs), rare)
    jax.tree.map(np.testing.assert_array_equal, drawing, same.sampling)
