"""Guesses are checked by the real programs: answers are those without them, to the bit."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax import placement
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.sharding import make_mesh
from serving.engine import build as engines
from serving.engine.build import compile_steps
from serving.engine.engine import Engine
from serving.scheduling.guesses import worth
from serving.scheduling.guesses.guesser import Proposer
from serving.scheduling.guesses.lookup import LookUp
from serving.scheduling.request import Request
from tests.serving.engine.test_engine import (
    VOCAB,
    Answers,
    assert_near,
    limits,
    random_requests,
    serve,
    toy,
)
from tests.support.models import model_of, split_over, whole_kernels_for


class Knowing:
    """Guesses the answers that it was told, some tokens of them wrong."""

    chance = 0.9

    def __init__(self, answers: Sequence[list[int]], prompt: int, dice: random.Random) -> None:
        self._answers, self._prompt, self._dice = answers, prompt, dice

    def guess(self, tokens: Sequence[int], count: int) -> Sequence[int]:
        said = list(tokens[self._prompt :])
        for answer in self._answers:
            if answer[: len(said)] == said:
                rest = answer[len(said) :][: min(count, 5)]
                return [(t + (self._dice.random() < 0.2)) % VOCAB for t in rest]
        return []


@pytest.fixture(scope="module", params=[pytest.param("float32", marks=pytest.mark.soak), "int8"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return toy(None, request.param)


def engine_of(
    model: Transformer, guesses: Proposer | None, *, has_masks: bool = False, **changes: Any
) -> Engine:
    given = limits(**changes)
    steps = compile_steps(model, given, has_masks=has_masks)
    return engines.engine_of(model, given, steps, proposer=guesses)


def knowing(answers: Answers) -> Callable[[Request], Knowing]:
    dice = random.Random(3)

    def begin(request: Request) -> Knowing:
        own = [answers[request.id, choice] for choice in range(request.n)]
        ids = [[drawn.token_id for drawn in answer] for answer in own]
        return Knowing(ids, len(request.prompt_ids), dice)

    return begin


def test_answers_with_guesses_equal_those_without(model: Transformer) -> None:
    """With penalties, biases, logprobs, several choices, ends of all kinds, and too few pages."""
    asked = random_requests(60)
    plain, _ = serve(engine_of(model, None), asked, seed=1)
    engine = engine_of(model, knowing(plain))
    guessed, _ = serve(engine, asked, seed=2)
    assert guessed == plain
    scheduler = engine.scheduler
    assert scheduler.accepted > 100 and scheduler.guesses - scheduler.accepted > 50
    told = [drawn for answer in guessed.values() for drawn in answer]
    assert 0 < sum(drawn.accepted for drawn in told) <= scheduler.accepted
    assert 0 < sum(drawn.rejected for drawn in told) <= scheduler.guesses - scheduler.accepted


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("window", "groups")),
        "whole",
        "masks",
    ],
)
def test_answers_with_guesses_are_the_same_in_every_kind_of_step(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a sliding window, as one program, over two groups of sequences, beside rows of masks."""
    if kind == "whole":
        monkeypatch.setattr(placement, "kernels_for_device", whole_kernels_for)
    model = toy(9 if kind == "window" else None, "float32")
    if kind == "groups":
        model = split_over(model, make_mesh(2, 1, 1))
    asked = random_requests(30, seed=6)
    if kind == "masks":
        asked[::3] = [replace(r, allowed_ids=frozenset(range(0, VOCAB, 2))) for r in asked[::3]]
    options: dict[str, Any] = {"has_masks": kind == "masks", "window": model.config.sliding_window}
    plain, _ = serve(engine_of(model, None, **options), asked, seed=1)
    engine = engine_of(model, knowing(plain), **options)
    guessed, _ = serve(engine, asked, seed=2)
    for key, answer in plain.items():
        assert_near(guessed[key], answer)
    assert engine.scheduler.accepted > 50


def test_requests_that_are_cancelled_leave_the_others_as_they_are(model: Transformer) -> None:
    asked = random_requests(40, seed=8)
    plain, _ = serve(engine_of(model, None), asked, seed=1)
    engine = engine_of(model, knowing(plain))
    guessed, cancelled = serve(engine, asked, seed=5, cancel=0.1)
    assert cancelled and len(cancelled) < 40
    for key, answer in guessed.items():
        assert answer == plain[key][: len(answer)]
        assert key[0] in cancelled or len(answer) == len(plain[key])
    assert engine.scheduler.num_free_pages == engine.scheduler.num_pages


def test_a_text_that_repeats_takes_fewer_steps() -> None:
    """A toy that walks in circles: every step yields several of their tokens."""
    model = model_of(ModelConfig.tiny(vocab_size=VOCAB), dtype="float32")
    asked = Request(
        id="A",
        prompt_ids=(1, 2, 3),
        sampling=SamplingParams(temperature=0.0),
        max_tokens=90,
        eos_ids=frozenset(),
    )
    answers, steps = [], []
    for guesses in (None, LookUp.of):
        engine = engine_of(model, guesses)
        count = 0

        def stepped(num_tokens: int) -> None:
            nonlocal count
            count += num_tokens > 0

        engine.on_step = stepped
        answers.append(serve(engine, [asked], seed=1)[0])
        steps.append(count)
    assert answers[0] == answers[1]
    assert steps[0] >= 90 and steps[1] < 75


class ThirdToken:
    """The third token of answers to one prompt at temperature 2, of which many are drawn."""

    prompt, choices = (5, 17, 3), 50

    def __init__(self, model: Transformer) -> None:
        def probabilities(tokens: list[list[int]]) -> np.ndarray:
            logits = model(jnp.asarray(tokens))[:, -1].astype(jnp.float32)
            return np.asarray(jax.nn.softmax(logits / 2.0, axis=-1), np.float64)

        every = range(VOCAB)
        first = probabilities([list(self.prompt)])[0]
        second = first[:, None] * probabilities([[*self.prompt, a] for a in every])
        self.after = probabilities([[*self.prompt, a, b] for a in every for b in every])
        self.wanted = second.reshape(-1) @ self.after

    @property
    def limits(self) -> dict[str, int]:
        """Sizes of an engine that has room for guesses beside all choices."""
        rows = 2 * self.choices
        return {"max_sequences": rows, "max_step_tokens": rows, "num_pages": 2 * rows}

    def check(self, engine: Engine, count: int) -> None:
        """Draws it `count` times, and holds that against the model's own distribution."""
        drawn: Counter[int] = Counter()
        for start in range(0, count, self.choices):
            asked = Request(
                id=str(start),
                prompt_ids=self.prompt,
                sampling=SamplingParams(temperature=2.0, seed=start * 7919),
                max_tokens=5,
                eos_ids=frozenset(),
                n=self.choices,
            )
            for answer in serve(engine, [asked], seed=1)[0].values():
                drawn[answer[2].token_id] += 1
        expected = self.wanted * count
        seen = np.array([drawn[token] for token in range(VOCAB)], np.float64)
        often = expected >= 10
        square = float(((seen - expected) ** 2 / expected)[often].sum())
        freedom = int(often.sum()) - 1
        assert freedom > 10
        # Five standard deviations of chi-square above its mean.
        assert square < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.soak
def test_the_distribution_is_the_one_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third token of 50,000 answers, the first that is guessed, against the model's own."""
    monkeypatch.setattr(worth, "_UNMEASURED_GUESSES", 99)
    model, count = toy(None, "float32"), 50_000
    third = ThirdToken(model)

    class Likeliest:
        chance = 0.9

        def guess(self, tokens: Sequence[int], most: int) -> Sequence[int]:
            last = tokens[-2:] if len(tokens) == 5 else [0, 0]
            return [int(third.after[last[0] * VOCAB + last[1]].argmax()), 0][:most]

    engine = engine_of(model, lambda request: Likeliest(), **third.limits)
    third.check(engine, count)
    accepted = engine.scheduler.accepted
    assert count / 20 < accepted < engine.scheduler.guesses - count / 20
