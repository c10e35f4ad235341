"""With `deterministic`, answers of a form have the same bits whatever else the engine computes."""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from mixtral_jax.kernels.cpu import build
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.step.buckets import Steps
from mixtral_jax.step.inputs import mask_words
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.matcher import Matcher
from mixtral_jax.structure.specification import Kind, Specification
from serving.engine.build import compile_steps
from serving.engine.device import Masks
from serving.engine.engine import Engine
from serving.engine.grammars import Grammars
from serving.engine.runner import Runner
from serving.scheduling.request import Drawn, Request
from serving.scheduling.step_plan import Limits, StepPlan
from tests.support.forms import LIMITS, SCHEMA, TOKENIZER, Events, is_person, request, served, text
from tests.support.models import model_of

pytestmark = pytest.mark.skipif(not build.available(), reason="promised with the kernels only")
# What the steps were compiled for may be used in part.
CROWDED = replace(LIMITS, num_pages=56, max_step_tokens=9)
WITHOUT_PREFIXES = replace(LIMITS, prefix_reuse=False)
SHARED = "Every one of these questions begins with the same words. "


LETTERS = frozenset(TOKENIZER.encode("abcdefgh")[-8:])
KINDS = ["float32", pytest.param("int8", marks=pytest.mark.soak)]


@pytest.fixture(scope="module", params=KINDS)
def compiled(
    request: pytest.FixtureRequest, model: Transformer, steps: Steps
) -> tuple[Transformer, Steps]:
    """A model with the kernels that the promise is about, and its steps."""
    assert LIMITS.deterministic
    if request.param == "float32":
        return model, steps
    rounded = model_of(model.config, request.param)
    return rounded, compile_steps(rounded, LIMITS)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler(TOKENIZER, TOKENIZER.vocab_size, processes=0) as compiler:
        yield compiler


@pytest.fixture(scope="module")
def asked(compiler: Compiler) -> list[Request]:
    """Eight requests, five of them with a form, and one with allowed ids; three show the logprobs
    of drawn tokens."""

    def form(kind: Kind, content: str) -> Form:
        return compiler.compile(Specification(kind, content), continues=False, salt=b"")

    person = form(Kind.JSON_SCHEMA, json.dumps(SCHEMA))
    number = form(Kind.REGEX, "[0-9]{3}-[0-9]{30}")
    shown = SamplingParams(temperature=1.5, seed=11, top_logprobs=3)
    cases: list[tuple[Form | None, SamplingParams, int]] = [
        (person, shown, 1),
        (person, SamplingParams(temperature=1.5, seed=12), 2),
        (person, SamplingParams(temperature=0.7, seed=13, frequency_penalty=1.0), 1),
        (number, replace(shown, seed=14, top_p=0.9), 1),
        (number, SamplingParams(temperature=0.0), 1),
        (None, replace(shown, seed=15), 1),
        (None, SamplingParams(temperature=1.0, seed=16, top_k=20, presence_penalty=0.5), 1),
        (None, SamplingParams(temperature=0.0, top_logprobs=1), 2),
    ]
    return [
        request(
            str(i),
            form,
            sampling=sampling,
            n=n,
            max_tokens=100,
            prompt_ids=tuple(TOKENIZER.encode(f"{SHARED if i % 3 else ''}Question {i}?")),
            allowed_ids=LETTERS if i == 6 else frozenset(),
        )
        for i, (form, sampling, n) in enumerate(cases)
    ]


def engine_of(compiled: tuple[Transformer, Steps], limits: Limits) -> Engine:
    return Engine(Runner(*compiled), limits, masks=Grammars(mask_words(TOKENIZER.vocab_size)))


Answers = dict[tuple[str, int], list[Drawn]]


def bits(events: Events) -> Answers:
    """Tokens with their logprobs; two floats are equal here if their bits are."""
    return {
        key: [event.drawn for event in of_choice if event.drawn is not None]
        for key, of_choice in events.items()
    }


@pytest.fixture(scope="module")
def alone(compiled: tuple[Transformer, Steps], asked: list[Request]) -> Answers:
    """The answers to each request by an engine that has nothing else to do."""
    answers: Answers = {}
    for one in asked:
        events = served(engine_of(compiled, WITHOUT_PREFIXES), one)
        answers |= bits(events)
        if one.id in ("0", "1", "2"):
            assert all(is_person(text(of_choice)) for of_choice in events.values())
    assert len(answers) == 10 and all(answers.values())
    assert {drawn.token_id for drawn in answers["6", 0]} <= LETTERS
    assert all(drawn.logprob is not None for drawn in answers["0", 0] + answers["3", 0])
    # Spaces may stand between; certain are name" and age" and ok" and the rest of true or false.
    assert sum(drawn.forced for drawn in answers["1", 1]) >= 5 + 4 + 3 + 3
    return answers


@pytest.mark.slow
def test_the_same_bits_among_seven_others(
    compiled: tuple[Transformer, Steps], asked: list[Request], alone: Answers
) -> None:
    """Ten rows are more than there are: two wait, so rows come and go beside the others."""
    assert bits(served(engine_of(compiled, LIMITS), *asked)) == alone
    assert bits(served(engine_of(compiled, LIMITS), *asked[::-1])) == alone
    with_forms = [one for one in asked if one.form is not None]
    for key, answer in bits(served(engine_of(compiled, LIMITS), *with_forms)).items():
        assert answer == alone[key]


@pytest.mark.slow
def test_the_same_bits_after_preemption_and_in_small_chunks(
    compiled: tuple[Transformer, Steps], asked: list[Request], alone: Answers
) -> None:
    engine = engine_of(compiled, CROWDED)
    assert bits(served(engine, *asked)) == alone
    assert engine.scheduler.preemptions >= 4


@pytest.mark.slow
def test_the_same_bits_with_prefix_hits(
    compiled: tuple[Transformer, Steps], asked: list[Request], alone: Answers
) -> None:
    """The second time the prompts are there from the first, whose last tokens were drawn masked."""
    engine = engine_of(compiled, LIMITS)
    assert bits(served(engine, *asked)) == alone
    before = engine.scheduler.prefix_hit_tokens
    again = [replace(one, id=f"{one.id} again") for one in asked]
    answers = bits(served(engine, *again))
    assert {(name.removesuffix(" again"), n): v for (name, n), v in answers.items()} == alone
    num_full_pages = sum((len(one.prompt_ids) - 1) // 4 for one in asked)
    assert engine.scheduler.prefix_hit_tokens - before >= 4 * num_full_pages


@pytest.mark.slow
def test_the_same_bits_where_masks_are_late(
    compiled: tuple[Transformer, Steps],
    asked: list[Request],
    alone: Answers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every ninth mask takes 40 ms, where 20 are waited for: its row draws in a later step."""
    fill, count = Matcher.fill, itertools.count()

    def slow_fill(self: Matcher, mask: np.ndarray) -> None:
        if next(count) % 9 == 0:
            time.sleep(0.04)
        fill(self, mask)

    class Counted(Grammars):
        num_late = 0

        def masks(self, plans: Sequence[StepPlan]) -> Masks:
            masks = super().masks(plans)
            self.num_late += len(masks.late)
            return masks

    monkeypatch.setattr(Matcher, "fill", slow_fill)
    grammars = Counted(mask_words(TOKENIZER.vocab_size))
    engine = Engine(Runner(*compiled), LIMITS, masks=grammars)
    assert bits(served(engine, *asked)) == alone
    assert grammars.num_late > 10
