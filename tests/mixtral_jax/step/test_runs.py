"""A run of steps gives what single steps give, of which each is told what the one before drew."""

from dataclasses import replace

import numpy as np
import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.sharding import make_mesh
from mixtral_jax.step.buckets import compile_buckets
from mixtral_jax.step.inputs import GroupInputs, StepInputs, StepSizes
from mixtral_jax.step.launcher import StepLauncher
from tests.support.models import model_of, split_over

SIZES = StepSizes(num_pages=9, page_size=4, max_sequences=4, max_context=12)
PAGES = [[1, 2, 3], [4, 5, 6], [7, 8]]
SAMPLING = [SamplingParams(temperature=t) for t in (0.0, 0.8, 1.3)]


def launched(model: Transformer, *, is_whole: bool) -> tuple[StepLauncher, list[int]]:
    """A launcher whose last step has computed the prompts, in the order 2 1 0; and its tokens."""
    steps = compile_buckets(
        model, SIZES, {4: 4, 8: 4}, has_masks=False, is_whole=is_whole, run_steps=5
    )
    launcher = StepLauncher(model, steps)
    inputs = steps.blank(8)
    writer = GroupInputs(inputs, 0, SIZES.max_sequences)
    for number, ids in [(2, [6]), (1, [4, 5]), (0, [1, 2, 3])]:
        row = writer.add(ids, 0, PAGES[number])
        writer.sample(row, SAMPLING[number], seed=number, position=len(ids), prompt_length=1)
    packed = launcher.launch(inputs).packed
    assert packed is not None
    return launcher, np.asarray(packed)[2::-1, 0].tolist()


def next_inputs(launcher: StepLauncher, starts: list[int], tokens: list[int] | None) -> StepInputs:
    """A token of each sequence, or with None what the prompts' step drew."""
    inputs = launcher.steps.blank(launcher.steps.run_bucket(3))
    writer = GroupInputs(inputs, 0, SIZES.max_sequences)
    for number, start in enumerate(starts):
        ids, follows = ([0], 2 - number) if tokens is None else ([tokens[number]], None)
        row = writer.add(ids, start, PAGES[number], follows)
        writer.sample(row, SAMPLING[number], seed=number, position=start + 1, prompt_length=1)
    return inputs


@pytest.mark.parametrize("form", ["layerwise", "whole", "mesh"])
def test_a_run_equals_single_steps(form: str) -> None:
    """The third sequence is in two of four steps, and the page behind its last one is untouched."""
    config = replace(ModelConfig.tiny(vocab_size=300), sliding_window=5)
    model = model_of(config)
    if form == "mesh":
        model = split_over(model, make_mesh(1, 1, 2))
    launcher, first = launched(model, is_whole=form != "layerwise")
    run = launcher.run(next_inputs(launcher, [3, 2, 1], None), [3, 3, 2, 2]).read()
    singly, same = launched(model, is_whole=False)
    assert first == same
    tokens, starts = first, [3, 2, 1]
    for step, active in enumerate([3, 3, 2, 2]):
        inputs = next_inputs(singly, starts[:active], tokens)
        packed = singly.launch(inputs).packed
        tokens = np.asarray(packed)[:active, 0].tolist()
        assert run[step, :active].tolist() == tokens
        starts = [start + 1 for start in starts]
    for ours, theirs in zip(launcher._layers, singly._layers, strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=1e-5)
