"""Steps in which few rows draw, or none, compute no draw for the others."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.step.buckets import Steps
from mixtral_jax.step.programs import Ends, Programs
from serving.engine.build import compile_steps, engine_of
from serving.scheduling.request import Request
from tests.serving.engine.test_programs_without_grammars import Noted
from tests.support.forms import LIMITS, request, served

FEW, MANY, STEP = 1, 3, 16


@pytest.fixture(scope="module")
def steps(model: Transformer) -> Steps:
    limits = replace(LIMITS, max_sequences=MANY, max_step_tokens=STEP, deterministic=False)
    return compile_steps(model, limits, buckets=(FEW, STEP), has_masks=False)


def requests() -> list[Request]:
    """A prompt of three steps, one that begins beside it, and a short one."""
    cold = SamplingParams(temperature=0.0)
    prompts = ("a" * 40, "bb" * 9, "c")
    return [
        request(text[0], None, prompt_ids=tuple(text.encode()), sampling=cold, max_tokens=4)
        for text in prompts
    ]


def served_with(model: Transformer, steps: Steps, *asked: Request) -> tuple[Any, list[int]]:
    """What the requests get, and the rows of each draw."""
    rows: list[int] = []

    def noted(number: int, ends: Ends) -> Ends:
        return ends._replace(draw=Noted(ends.draw, partial(rows.append, number)))

    def watched(programs: Programs) -> Programs:
        fewer = {number: noted(number, ends) for number, ends in programs.fewer.items()}
        plain = noted(0, Ends(programs.pick, programs.draw, None))
        return programs._replace(draw=plain.draw, fewer=fewer)

    buckets = {size: watched(programs) for size, programs in steps.buckets.items()}
    limits = replace(LIMITS, max_sequences=MANY, max_step_tokens=STEP, deterministic=False)
    return served(engine_of(model, limits, replace(steps, buckets=buckets)), *asked), rows


def test_answers_are_those_of_steps_that_draw_in_all_rows(model: Transformer, steps: Steps) -> None:
    assert [sorted(steps.buckets[size].fewer) for size in (FEW, STEP)] == [[], [FEW]]
    whole = {size: programs._replace(fewer={}) for size, programs in steps.buckets.items()}
    for asked in (requests(), requests()[:1]):
        answers, _ = served_with(model, steps, *asked)
        same, rows = served_with(model, replace(steps, buckets=whole), *asked)
        assert same == answers and {*rows} == {0}


def test_a_step_within_a_prompt_draws_nothing_and_its_end_one_row(
    model: Transformer, steps: Steps
) -> None:
    """Forty tokens take three steps of sixteen, of which the last one draws the first of four."""
    _, rows = served_with(model, steps, requests()[0])
    assert rows == [FEW, 0, 0, 0]
