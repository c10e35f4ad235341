"""A draft model guesses; answers are those without it, to the bit."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import pytest

from mixtral_jax import placement
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.step.launcher import StepLauncher
from serving.engine import build as engines
from serving.engine.build import compile_steps
from serving.engine.drafts.draft import LoadedDraft, compile_draft
from serving.engine.drafts.drafter import DraftModel
from serving.engine.engine import Engine
from serving.scheduling.guesses import worth
from serving.scheduling.pages import PagePool
from serving.scheduling.queue import TurnQueue
from serving.scheduling.request import Request
from serving.scheduling.rows import Rows
from serving.scheduling.step_plan import Limits
from tests.serving.engine.test_engine import (
    SMALL,
    assert_near,
    limits,
    random_requests,
    serve,
    toy,
)
from tests.serving.engine.test_speculation import ThirdToken
from tests.support.models import whole_kernels_for

DRAFT = limits(max_sequences=4)


class Pair:
    """A model and its draft, compiled once."""

    def __init__(
        self,
        model: Transformer,
        draft: Transformer,
        given: Limits = SMALL,
        own: Limits = DRAFT,
        *,
        has_masks: bool = False,
    ) -> None:
        self.model, self.draft, self.given, self.own = model, draft, given, own
        self.steps = compile_steps(model, given, has_masks=has_masks)
        self.draft_steps = compile_draft(draft, own)

    def engine(self, drafter: DraftModel | None = None) -> Engine:
        return engines.engine_of(self.model, self.given, self.steps, drafter=drafter)

    def drafter(self) -> DraftModel:
        return LoadedDraft(self.draft, self.own, self.draft_steps).drafter()


@pytest.fixture(scope="module")
def pair() -> Pair:
    """An int8 model and the float32 one that it was rounded from: they disagree now and then."""
    return Pair(toy(None, "int8"), toy(None, "float32"))


def test_answers_with_a_draft_equal_those_without(pair: Pair) -> None:
    """Penalties, biases, logprobs, several choices, all ends, and too few pages for both models."""
    asked = random_requests(60)
    plain, _ = serve(pair.engine(), asked, seed=1)
    drafter = pair.drafter()
    engine = pair.engine(drafter)
    guessed, _ = serve(engine, asked, seed=2)
    assert guessed == plain
    scheduler = engine.scheduler
    assert scheduler.preemptions > 20
    assert scheduler.accepted > 100 and scheduler.guesses - scheduler.accepted > 100
    told = [drawn for answer in guessed.values() for drawn in answer]
    assert 0 < sum(drawn.accepted for drawn in told) <= scheduler.accepted
    assert drafter.num_drafts > 100


def test_a_draft_like_the_model_is_nearly_always_right(pair: Pair) -> None:
    """At temperatures too, because it draws with the same noise, and with biases and penalties.

    These look back at all tokens but those that are guessed before the last guess.
    """
    twin = copy(pair)
    twin.model, twin.steps = pair.draft, compile_steps(pair.draft, SMALL, has_masks=False)
    engine = twin.engine(twin.drafter())
    serve(engine, random_requests(20, seed=6), seed=3)
    assert engine.scheduler.guesses > 200
    assert engine.scheduler.accepted >= 0.97 * engine.scheduler.guesses


def one(prompt: Sequence[int], max_tokens: int, **given: Any) -> Request:
    return Request(
        id="A",
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(temperature=0.0),
        max_tokens=max_tokens,
        eos_ids=frozenset(),
        **given,
    )


def tokens_of(engine: Engine, request: Request) -> list[int]:
    (answer,) = serve(engine, [request], seed=1)[0].values()
    return [drawn.token_id for drawn in answer]


def test_a_long_prompt_is_taken_in_by_pieces_while_the_answer_goes_on(pair: Pair) -> None:
    """60 tokens at 24 a step: two pieces beside single tokens, then guesses."""
    asked = one([i % 7 for i in range(60)], 30)
    drafter = pair.drafter()
    engine = pair.engine(drafter)
    draft, drafts = drafter.draft, list[tuple[int, int]]()

    def told(wanted: Any, behind: Any, **options: Any) -> Any:
        drafts.append((len(wanted), len(behind)))
        guesses = draft(wanted, behind, **options)
        # The pieces do not tell how long a guess takes, and the first guesses not well.
        assert (drafter.round_times() is None) == (len(drafts) < 2 + 3)
        return guesses

    drafter.draft = told  # type: ignore[method-assign]
    assert tokens_of(engine, asked) == tokens_of(pair.engine(), asked)
    assert drafts[:4] == [(0, 1), (0, 1), (1, 0), (1, 0)]
    assert engine.scheduler.guesses > 0


def test_an_answer_beyond_its_context_is_guessed_no_more(pair: Pair) -> None:
    """It is guessed up to its 41st token: the one before is the last that the draft computes."""
    few = replace(DRAFT, max_context=40)
    drafter = DraftModel(StepLauncher(pair.draft, pair.draft_steps), few)
    asked = one([5, 6, 7], 80)
    engine = pair.engine(drafter)
    answer = serve(engine, [asked], seed=1)[0]["A", 0]
    assert [drawn.token_id for drawn in answer] == tokens_of(pair.engine(), asked)
    guessed = [i for i, drawn in enumerate(answer) if drawn.accepted or drawn.rejected]
    assert guessed and 3 + max(guessed) <= 41


def test_drafts_that_fail_cost_no_answer(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """The second fails, then all: after three in a row it is not asked any more."""
    asked = one([5, 6, 7], 40)
    drafter = pair.drafter()
    engine = pair.engine(drafter)
    launch, count = drafter._launch, 0

    def broken(*given: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2 or count > 4:
            raise RuntimeError("the devices are lost")
        return launch(*given, **options)

    drafter._launch = broken  # type: ignore[method-assign]
    assert tokens_of(engine, asked) == tokens_of(pair.engine(), asked)
    assert count == 7
    assert caplog.text.count("the draft model failed; answers go on without") == 3
    assert caplog.text.count("the draft model failed; there are no more guesses") == 1
    assert engine.num_failures == 0


def test_a_draft_that_gets_no_new_pages_after_a_failure_is_not_asked_again(pair: Pair) -> None:
    asked = one([5, 6, 7], 20)
    drafter = pair.drafter()
    engine = pair.engine(drafter)
    calls: list[str] = []

    def broken(*given: Any, **options: Any) -> Any:
        calls.append("")
        raise RuntimeError("the devices are lost")

    drafter._launch = broken  # type: ignore[method-assign]
    drafter._launcher.reset = broken  # type: ignore[method-assign]
    assert tokens_of(engine, asked) == tokens_of(pair.engine(), asked)
    assert len(calls) == 2, "one launch and one reset"
    assert engine.num_failures == 0


def test_pages_go_back_when_answers_end(pair: Pair) -> None:
    """The last answers' pages go with the next draft."""
    drafter = pair.drafter()
    engine = pair.engine(drafter)
    serve(engine, random_requests(12), seed=4, cancel=0.2)
    drafter.draft({}, (), is_alone=True)
    assert drafter.num_free_pages == DRAFT.num_pages


def test_pages_before_a_window_are_registered_before_they_are_given_back(pair: Pair) -> None:
    """Two drafts of the same 20 tokens, as of an answer that finds no page for its guesses.

    In the second draft, with a window of 5, the pages of the first 12 tokens go back. None of the
    drafter's pages stands for tokens that it does not hold.
    """
    drafter = DraftModel(StepLauncher(pair.draft, pair.draft_steps), replace(DRAFT, window=5))
    pool = PagePool(1, 4)
    state = Rows(SMALL, TurnQueue(9), pool).sequence(one(range(20), 9), 0, 0)
    state.running = True
    for _ in range(2):
        drafter.draft({state: 1}, (), is_alone=True)
    state.tokens += [1, 2, 3]
    drafter.chance(state)
    pages, _ = drafter._pool.lookup(range(20), state.request.prefix_salt)
    assert len(set(pages)) == 5
    assert drafter.num_free_pages == DRAFT.num_pages - 2


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["window", "whole", "masks"])
def test_it_guesses_in_every_kind_of_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a window, as whole programs, and beside rows of masks."""
    if kind == "whole":
        monkeypatch.setattr(placement, "kernels_for_device", whole_kernels_for)
    window = 9 if kind == "window" else None
    given, own = limits(window=window), replace(DRAFT, window=window)
    pair = Pair(toy(window, "float32"), toy(window, "int8"), given, own, has_masks=kind == "masks")
    asked = random_requests(30, seed=6)
    if kind == "masks":
        asked[::3] = [replace(r, allowed_ids=frozenset(range(0, 60, 2))) for r in asked[::3]]
    plain, _ = serve(pair.engine(), asked, seed=1)
    engine = pair.engine(pair.drafter())
    guessed, _ = serve(engine, asked, seed=2)
    for key, answer in plain.items():
        assert_near(guessed[key], answer)
    assert engine.scheduler.accepted > 50


def test_its_times_are_measured_again_when_it_was_not_asked_for_long(pair: Pair) -> None:
    """Else a draft that was slow once, as the first may be, would never be tried again."""
    drafter = pair.drafter()
    assert drafter.round_times() is None
    tokens_of(pair.engine(drafter), one([5, 6, 7], 20))
    times = drafter.round_times()
    assert times is not None and times(4) >= times(1) > 0
    known = [drafter.round_times() is not None for _ in range(300)]
    assert known.count(True) < 200 and known == sorted(known, reverse=True)
    assert tokens_of(pair.engine(drafter), one([5, 6, 7], 20))
    assert drafter.round_times() is not None


@pytest.mark.soak
def test_the_distribution_is_the_one_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20,000 answers, whose third token is guessed with the noise by which it is drawn."""
    monkeypatch.setattr(worth, "_UNMEASURED_GUESSES", 99)
    model, count = toy(None, "float32"), 20_000
    third = ThirdToken(model)
    given = limits(**third.limits)
    drafting = Pair(model, toy(None, "int8"), given, replace(given, max_sequences=third.choices))
    engine = drafting.engine(drafting.drafter())
    third.check(engine, count)
    accepted = engine.scheduler.accepted
    assert count / 4 < accepted < engine.scheduler.guesses - count / 20
