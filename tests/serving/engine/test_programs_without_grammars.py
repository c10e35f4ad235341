"""Requests without a form run the programs that they would run if there were no grammars."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from jax.stages import Compiled

from mixtral_jax.axes import FlatLogits, RowMasks
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.step import sampling
from mixtral_jax.step.buckets import Steps
from mixtral_jax.step.inputs import StepInputs, mask_words
from mixtral_jax.step.programs import Programs, compile_draw
from mixtral_jax.step.split_model import SplitModel
from mixtral_jax.structure.matcher import Guide
from serving.engine.build import engine_of
from serving.engine.engine import Engine
from serving.engine.runner import Runner
from serving.scheduling.request import Request
from tests.serving.engine.test_same_programs import instructions
from tests.support.forms import LIMITS, TOKENIZER, ids, regex, request, served, text

Launches = list[tuple[int, str]]
"""Step size and name of each program that an engine has called, in order."""


class Noted(Compiled):
    """A program whose calls are written down."""

    def __init__(self, program: Compiled, note: Callable[[], None]) -> None:
        self._program, self._note = program, note

    def __call__(self, *given: Any) -> Any:
        self._note()
        return self._program(*given)


def watched(steps: Steps) -> tuple[Steps, Launches]:
    """The same steps, and where their programs' calls are written down."""
    launches: Launches = []

    def noted(size: int, programs: Programs) -> Programs:
        def watch(name: str, program: Compiled | None) -> Noted:
            assert program is not None
            return Noted(program, partial(launches.append, (size, name)))

        (block,) = programs.blocks
        return Programs(
            embed=watch("embed", programs.embed),
            blocks=(watch("block", block),),
            forms=programs.forms,
            pick=watch("pick", programs.pick),
            draw=watch("draw", programs.draw),
            draw_masked=watch("draw_masked", programs.draw_masked),
        )

    buckets = {size: noted(size, programs) for size, programs in steps.buckets.items()}
    return replace(steps, buckets=buckets), launches


def without_forms() -> list[Request]:
    return [
        request("hot", None, n=2, max_tokens=20),
        request("cold", None, sampling=SamplingParams(temperature=0.0), max_tokens=25),
        request("shown", None, sampling=SamplingParams(seed=1, top_logprobs=2), max_tokens=9),
        request("held back", None, sampling=SamplingParams(seed=2, presence_penalty=1.0)),
    ]


def test_requests_without_a_form_launch_what_an_engine_without_grammars_does(
    model: Transformer, steps: Steps
) -> None:
    noted, launches = watched(steps)
    answers = served(engine_of(model, LIMITS, noted), *without_forms())
    bare, launches_of_bare = watched(steps)
    assert served(Engine(Runner(model, bare), LIMITS), *without_forms()) == answers
    assert launches == launches_of_bare
    assert "draw_masked" not in {name for _, name in launches}
    assert {1, 8, 64} <= {size for size, _ in launches}
    num_layers = model.config.num_layers
    assert len(launches) % (num_layers + 3) == 0
    for i in range(0, len(launches), num_layers + 3):
        (size, _), *_ = launches[i:]
        names = ["embed", *["block"] * num_layers, "pick", "draw"]
        assert launches[i : i + num_layers + 3] == [(size, name) for name in names]


def test_masks_are_launched_for_as_long_as_a_row_has_one(
    model: Transformer, steps: Steps, guide: Guide
) -> None:
    """A form that begins after "(" masks nothing as long as that is not drawn; and when the last
    answer of a form has ended, the others go on as they began."""
    trigger = TOKENIZER.encode("(")[-1]
    never = SamplingParams(temperature=0.0, logit_bias={trigger: -100.0})
    later = regex(guide, r"\([0-9]{3}\)", begins_after=trigger)
    noted, launches = watched(steps)
    engine = engine_of(model, LIMITS, noted)
    served(engine, request("talks", later, sampling=never, max_tokens=20))
    assert launches and "draw_masked" not in {name for _, name in launches}
    launches.clear()
    short = request("digits", regex(guide, "[0-9]{5}"))
    answers = served(engine, short, request("plain", None, max_tokens=40))
    assert text(answers["digits", 0]).isdigit() and len(ids(answers["plain", 0])) == 40
    draws = [name for _, name in launches if name.startswith("draw")]
    assert 5 <= draws.count("draw_masked") <= 6
    last = len(draws) - draws[::-1].index("draw_masked")
    assert last < 20 and len(draws) >= 40


def test_the_program_that_draws_without_masks_has_nothing_of_them(
    model: Transformer, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled where sampling knows no masks it is the same text; the masked one is not."""
    rows = LIMITS.max_sequences
    inputs = StepInputs.blank(LIMITS.max_step_tokens, rows, steps.sizes, steps.groups)
    programs = steps.buckets[LIMITS.max_step_tokens]

    def no_mask(scores: FlatLogits, logits: FlatLogits, allowed: RowMasks) -> FlatLogits:
        return scores

    monkeypatch.setattr(sampling, "_mask", no_mask)
    draw, unmasked = compile_draw(SplitModel.of(model), inputs, rows)
    assert instructions(draw) == instructions(programs.draw)
    assert instructions(unmasked) != instructions(programs.draw_masked)
    masks = f"s32[{rows},{mask_words(TOKENIZER.vocab_size)}]"
    assert not any(masks in line for line in instructions(programs.draw))
    assert any(masks in line for line in instructions(programs.draw_masked))
