"""Programs that are compiled beside the first answers."""

import logging
import threading
from dataclasses import replace

import jax
import pytest
from jax.stages import Lowered

from mixtral_jax.config import ModelConfig
from mixtral_jax.step.buckets import Steps
from mixtral_jax.step.inputs import StepSizes
from mixtral_jax.step.scores import ScorePrograms
from mixtral_jax.step.split_model import SplitModel
from mixtral_jax.step.whole_step import Kind, WholeSteps
from serving.launch.late_programs import LatePrograms
from tests.support.models import model_of

SIZES = StepSizes(num_pages=8, page_size=4, max_sequences=2, max_context=16)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Steps of two buckets, the larger of which is compiled; the programs compute nothing."""
    split = SplitModel.of(model_of(replace(ModelConfig.tiny(vocab_size=64), num_layers=1)))
    pages = split.pages(8, 4)
    whole = WholeSteps(split, pages, SIZES, None, {2: 1, 4: 2})
    monkeypatch.setattr(whole, "lowered", lambda key: jax.jit(lambda: 0).lower())
    whole.compile_first([4], lambda line: None)
    return Steps(
        pages=pages,
        rows={2: 1, 4: 2},
        empty=jax.jit(lambda: 0).lower().compile(),
        whole=whole,
        buckets={},
        copy=None,
        sizes=SIZES,
        groups=None,
        scores=ScorePrograms(split, [2, 4]),
    )


def test_what_is_missing_is_compiled_in_a_thread(steps: Steps) -> None:
    said: list[str] = []
    late = LatePrograms(steps, said.append)
    late.start()
    late._thread.join(60)
    assert late.stop()
    assert steps.whole is not None and not steps.whole.missing
    assert steps.bucket(1) == 2
    assert said == ["all 3 programs that were missing are compiled"]


def test_the_end_is_told_of_scores_that_are_being_compiled(
    steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, may_end = threading.Event(), threading.Event()

    def prepare() -> None:
        has_begun.set()
        assert may_end.wait(60)

    monkeypatch.setattr(steps.scores, "prepare", prepare)
    late = LatePrograms(steps, lambda line: None)
    running, waiting = late.prepare_scores(), late.prepare_scores()
    assert has_begun.wait(60)
    assert not late.stop()  # the exit of the process would wait for it
    assert waiting.cancelled()
    may_end.set()
    running.result(60)
    assert late.stop()


@pytest.mark.parametrize(("failing", "buckets"), [((Kind(), 2), (4, 2)), (("draw", 1), (2, 4))])
def test_a_program_that_cannot_be_compiled_leaves_the_others(
    steps: Steps,
    failing: tuple[Kind | str, int],
    buckets: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert steps.whole is not None

    def lowered(key: tuple[Kind | str, int]) -> Lowered:
        if key == failing:
            raise ValueError("the compiler ran out of memory")
        return jax.jit(lambda: 0).lower()

    monkeypatch.setattr(steps.whole, "lowered", lowered)
    late = LatePrograms(steps, lambda line: None)
    with caplog.at_level(logging.ERROR):
        late.start()
        late._thread.join(60)
    assert "could not be compiled; steps go on" in caplog.text
    assert "ran out of memory" in caplog.text
    assert steps.whole.missing == [failing]
    # A walk without the draw of its rows is of no use.
    assert (steps.bucket(1), steps.bucket(1, masked=True)) == buckets


def test_nothing_is_started_where_nothing_is_missing(steps: Steps) -> None:
    assert steps.whole is not None
    steps.whole.compile_rest()
    late = LatePrograms(steps, lambda line: None)
    late.start()
    assert not late._thread.is_alive()
    assert late.stop()
