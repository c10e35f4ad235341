"""Rows of several adapters and of none share a step, and each is what it would be alone."""

import re
from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.adapter import Adapter, AdapterConfig
from mixtral_jax.model.adapter_stack import NO_SLOT, StackSizes
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.step.buckets import Steps, compile_buckets
from mixtral_jax.step.draws import unpack
from mixtral_jax.step.inputs import GroupInputs, StepSizes
from mixtral_jax.step.launcher import StepLauncher
from tests.support import sources
from tests.support.adapters import random_adapter
from tests.support.merged_models import merged_model
from tests.support.models import model_of

CONFIGS = {"dense": from_hf(sources.DENSE), "moe": from_hf(sources.MOE)}
SIZES = StepSizes(num_pages=16, page_size=4, max_sequences=4, max_context=16)
PROMPTS = [(5, 6, 7), (5, 6, 7), (8, 9), (5, 6, 7)]
SLOTS = [0, NO_SLOT, 2, 2]


def settings_of(kind: str, slot: int) -> AdapterConfig:
    """Slot 0: every target. Slot 2: a smaller rank, and some targets only."""
    if slot == 0:
        targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
        router = ("router",) if kind == "moe" else ()
        return AdapterConfig(targets=targets + router, rank=4, alpha=6.0)
    return AdapterConfig(targets=("v", "down"), rank=2, alpha=8.0)


@cache
def adapter_of(kind: str, slot: int) -> Adapter:
    return random_adapter(CONFIGS[kind], settings_of(kind, slot), seed=10 + slot)


@cache
def steps_of(kind: str, with_adapters: bool) -> Steps:
    config = CONFIGS[kind]
    sizes = StackSizes.all_targets(config, slots=3, rank=4) if with_adapters else None
    return compile_buckets(model_of(config), SIZES, {16: 4}, adapters=sizes)


def launcher_of(kind: str) -> StepLauncher:
    launcher = StepLauncher(model_of(CONFIGS[kind]), steps_of(kind, True))
    for slot in (0, 2):
        adapter = adapter_of(kind, slot).folded(settings_of(kind, slot))
        launcher.put_adapter(slot, adapter)
    return launcher


def logprobs(launcher: StepLauncher, rows: Sequence[int], slots: Sequence[int]) -> np.ndarray:
    """The twenty likeliest tokens' logprobs behind some of the prompts, one row for each."""
    launcher.reset()
    inputs = launcher.steps.blank(16)
    group = GroupInputs(inputs, 0, 4)
    for row, slot in zip(rows, slots, strict=True):
        ids = PROMPTS[row]
        at = group.add(ids, 0, [row], slot=slot)
        sampling = SamplingParams(temperature=0.0, top_logprobs=20)
        group.sample(at, sampling, seed=0, position=len(ids), prompt_length=len(ids))
    draws = unpack(np.asarray(launcher.launch(inputs).packed))
    return draws.top_logprobs[: len(rows)]


def of_model(model: Transformer, row: int) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        scores = model(jnp.asarray([PROMPTS[row]]))[0, -1]
    return np.sort(np.asarray(jax.nn.log_softmax(scores)))[::-1][:20]


@pytest.mark.parametrize("kind", ["moe", pytest.param("dense", marks=pytest.mark.soak)])
def test_rows_of_several_adapters_share_a_step(kind: str) -> None:
    launcher = launcher_of(kind)
    together = logprobs(launcher, [0, 1, 2, 3], SLOTS)
    for row, slot in enumerate(SLOTS):
        config = CONFIGS[kind]
        if slot == NO_SLOT:
            want = of_model(model_of(config), row)
        else:
            settings = settings_of(kind, slot)
            want = of_model(merged_model(config, adapter_of(kind, slot), settings), row)
        np.testing.assert_allclose(together[row], want, rtol=0, atol=2e-5)
        alone = logprobs(launcher, [row], [slot])[0]
        np.testing.assert_array_equal(together[row], alone)  # in every bit
    assert np.abs(together[0] - together[1]).max() > 1e-3


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_row_keeps_its_bits_beside_other_adapters(kind: str) -> None:
    launcher = launcher_of(kind)
    base = StepLauncher(model_of(CONFIGS[kind]), steps_of(kind, False))
    want = logprobs(base, [0, 1, 2, 3], [NO_SLOT] * 4)
    for slots in (SLOTS, [2, NO_SLOT, 0, 0], [0, NO_SLOT, NO_SLOT, NO_SLOT], [NO_SLOT] * 4):
        got = logprobs(launcher, [0, 1, 2, 3], slots)
        rows = [row for row, slot in enumerate(slots) if slot == NO_SLOT]
        np.testing.assert_array_equal(got[rows], want[rows])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_step_without_adapters_runs_the_program_that_it_would_run(kind: str) -> None:
    plain, ours = steps_of(kind, False).buckets[16], steps_of(kind, True).buckets[16]
    assert not plain.adapted_blocks
    for want, program in zip(plain.all[:5], ours.all[:5], strict=True):  # as far as both have them
        assert want is not None and program is not None
        assert instructions(program) == instructions(want)


def instructions(program: jax.stages.Compiled) -> list[str]:
    """The lines of a program's text, without the places in the source that it came from."""
    lines = (program.as_text() or "").splitlines()
    kept = [re.sub(r", metadata=\{[^}]*\}", "", line) for line in lines]
    return [line for line in kept if not re.match(r"\d+ [\"{]", line)]


def test_a_slot_is_written_anew() -> None:
    launcher = launcher_of("dense")
    before = logprobs(launcher, [0], [0])
    launcher.put_adapter(0, adapter_of("dense", 2).folded(settings_of("dense", 2)))
    np.testing.assert_array_equal(logprobs(launcher, [0], [0]), logprobs(launcher, [0], [2]))
    assert np.abs(before - logprobs(launcher, [0], [0])).max() > 1e-3
