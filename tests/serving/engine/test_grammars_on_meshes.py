"""Answers of a form in two sequence groups of a mesh are those of one device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.sharding import make_mesh
from mixtral_jax.step.inputs import mask_words
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.matcher import Guide
from serving.engine.build import compile_steps
from serving.engine.device import Masks
from serving.engine.engine import Engine
from serving.engine.grammars import Grammars
from serving.engine.runner import Runner, RunningStep, WalkedPlans
from serving.scheduling.request import Drawn, Request
from serving.scheduling.step_plan import Limits
from tests.support.forms import (
    TOKENIZER,
    Events,
    is_person,
    person_of,
    regex,
    request,
    served,
    text,
)
from tests.support.models import model_of, split_over

LIMITS = Limits(  # of one group
    num_pages=100,
    page_size=4,
    max_sequences=8,
    max_step_tokens=8,
    max_context=160,
    max_waiting=99,
    deterministic=True,  # steps of all sizes draw by one program, which saves compiling
)
CONFIG = replace(
    ModelConfig.tiny(vocab_size=TOKENIZER.vocab_size),
    num_experts=0,
    experts_per_token=0,
    sliding_window=None,
    max_context=160,
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Weights of ten times the usual size: the order of sums decides no draw."""
    model = model_of(CONFIG)
    for variable in named_parameters(model).values():
        value = variable.get_value()
        variable.set_value(value * 10 if value.ndim > 1 else value)
    return model


@dataclass
class Step:
    """A step that had masks."""

    masks: Masks
    running: RunningStep


class Recorder(Runner):
    """A runner that keeps its steps with masks."""

    def __init__(self, model: Transformer) -> None:
        super().__init__(model, compile_steps(model, LIMITS))
        self.steps: list[Step] = []

    def draw(self, walked: WalkedPlans, masks: Masks | None) -> RunningStep:
        running = super().draw(walked, masks)
        if masks is not None:
            self.steps.append(Step(masks, running))
        return running


def requests() -> list[Request]:
    """Of both kinds in each group: requests go to the group that has the fewest."""
    guide = Guide(TOKENIZER, TOKENIZER.vocab_size)
    person, digits = person_of(guide), regex(guide, "[0-9]{20}[a-f]{10}")
    forms: list[Form | None] = [person, digits, None, person, digits, None, person, person]
    shown = SamplingParams(temperature=1.0, top_logprobs=2)
    allowed, none = frozenset(TOKENIZER.encode("abcdefgh")[-8:]), frozenset[int]()
    return [
        request(str(i), form, sampling=replace(shown, seed=i), max_tokens=70)
        if i % 2
        else request(str(i), form, n=2, max_tokens=70, allowed_ids=allowed if i == 2 else none)
        for i, form in enumerate(forms)
    ]


def answers(runner: Runner, asked: Sequence[Request]) -> Events:
    engine = Engine(runner, LIMITS, masks=Grammars(mask_words(CONFIG.vocab_size)))
    return served(engine, *asked)


def drawn(events: Events) -> dict[tuple[str, int], list[Drawn]]:
    return {key: [e.drawn for e in of_choice if e.drawn] for key, of_choice in events.items()}


def may_draw(allowed: np.ndarray | None, row: int, token: int) -> bool:
    return allowed is None or bool(allowed[row, token // 32] >> np.int32(token % 32) & 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dp_attention"),
    [
        pytest.param((2, 1, 1), False, id="data", marks=pytest.mark.soak),
        pytest.param((1, 2, 1), True, id="sequences", marks=pytest.mark.soak),
        pytest.param((2, 2, 1), True, id="both"),
    ],
)
def test_rows_with_masks_in_both_groups_draw_what_one_device_draws(
    model: Transformer, shape: tuple[int, int, int], dp_attention: bool
) -> None:
    asked = requests()
    runner = Recorder(split_over(model, make_mesh(*shape), dp_attention))
    assert runner.num_partitions >= 2
    events = answers(runner, asked)
    got, want = drawn(events), drawn(answers(Recorder(model), asked))

    assert len(got) == 12 and got.keys() == want.keys()
    for key, draws in want.items():
        assert [d.token_id for d in got[key]] == [d.token_id for d in draws]
        for ours, theirs in zip(got[key], draws, strict=True):
            assert (ours.logprob is None) == (theirs.logprob is None)
            if theirs.logprob is not None:
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    for one in asked:
        if one.form is not None:
            answer = text(events[one.id, 0])
            assert is_person(answer) if one.id in "0367" else len(answer) == 30

    num_held = [0] * runner.num_partitions
    for step in runner.steps:
        for group, row_draws in enumerate(step.running.drawn()):
            allowed = step.masks.allowed[group]
            for row, token in enumerate(row_draws):
                assert token is None or may_draw(allowed, row, token.token_id)
                num_held[group] += allowed is not None and bool((allowed[row] != -1).any())
    assert min(num_held) > 15
    both = [step for step in runner.steps if all(m is not None for m in step.masks.allowed)]
    assert len(both) > 15
