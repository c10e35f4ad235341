"""A real model on the engine whose launcher fails: the pages that XLA has taken are gone."""

import asyncio
import itertools
import logging
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from itertools import cycle
from random import Random
from typing import Any

import pytest

import mixtral_jax
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.step.inputs import StepInputs
from mixtral_jax.step.launcher import StepLauncher
from serving.engine.build import compile_steps
from serving.engine.engine import Engine
from serving.engine.metrics import Metrics
from serving.engine.runner import Runner
from serving.engine.worker import EngineWorker
from serving.scheduling.request import FinishReason, Request
from serving.scheduling.step_plan import Limits

LIMITS = Limits(
    num_pages=40, page_size=8, max_sequences=4, max_step_tokens=8, max_context=64, max_waiting=99
)
POISON = 7  # a token; steps that read it fail


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    model, _ = mixtral_jax.load("tiny-random", mesh=None)
    return model, compile_steps(model, LIMITS, has_masks=False)


def requests() -> list[Request]:
    return [
        Request(
            id=f"r{i}",
            prompt_ids=tuple(100 + (13 * i + 5 * j) % 90 for j in range(3 + 6 * i)),
            sampling=SamplingParams(temperature=0.0 if i % 2 else 1.0, seed=i),
            max_tokens=9,
            eos_ids=frozenset(),
            n=1 + (i == 2),
        )
        for i in range(6)
    ]


def answers(
    parts: tuple[Any, Any], asked: list[Request], late: list[Request], break_step: Any
) -> tuple[dict[tuple[str, int], list[int]], list[str], Engine]:
    """Tokens by request and choice, and who failed. `late` come after three turns."""
    model, steps = parts
    runner = Runner(model, steps)
    break_step(runner._launcher)
    engine = Engine(runner, LIMITS)
    tokens: dict[tuple[str, int], list[int]] = {}
    failed = []
    for request in asked:
        engine.add(request)
    for turn in range(1000):
        for request in late if turn == 3 else []:
            engine.add(request)
        for event in engine.step():
            if event.finish_reason is FinishReason.FAILED:
                failed.append(event.request_id)
            elif event.drawn is not None:
                answer = tokens.setdefault((event.request_id, event.choice), [])
                answer.append(event.drawn.token_id)
        if turn > 3 and not engine.has_work:
            break
    assert engine.scheduler.num_free_pages == LIMITS.num_pages
    return tokens, failed, engine


def untouched(launcher: StepLauncher) -> None:
    pass


def breaking(place: str) -> Callable[[StepLauncher], None]:
    """Makes a launcher fail in steps that read POISON: before the first layer, in the second one,
    which has taken its pages, or after all of them."""

    def change(launcher: StepLauncher) -> None:
        name = starting(launcher)
        walk = getattr(launcher, name)

        def broken(inputs: StepInputs) -> Any:
            if POISON not in inputs.batch.tokens:
                return walk(inputs)
            if place == "before":
                raise RuntimeError("before the first layer")
            walk(inputs)
            if place == "in between":
                launcher._layers[1].delete()
            raise RuntimeError(place)

        setattr(launcher, name, broken)

    return change


def starting(launcher: StepLauncher) -> str:
    """The method that starts a step without masks."""
    return "walk" if launcher.steps.whole is None else "launch"


@pytest.mark.parametrize("place", ["before", "in between", "after"])
def test_the_others_have_the_tokens_of_a_run_without_faults(
    parts: tuple[Any, Any], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "serving.engine")
    asked = requests()
    wanted, none, engine = answers(parts, asked, [], untouched)
    assert len(wanted) == 7 and not none and engine.num_failures == 0
    poisoned = Request(
        id="bad",
        prompt_ids=(101, POISON, 102),
        sampling=SamplingParams(temperature=0.0),
        max_tokens=5,
        eos_ids=frozenset(),
    )
    tokens, failed, engine = answers(parts, asked, [poisoned], breaking(place))
    assert failed == ["bad"] and engine.num_failures == 2
    assert tokens == wanted


def test_ten_faults_under_32_streams_of_4_callers(
    parts: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Steps fail whoever is in them; each stream has the tokens of a run without faults."""
    caplog.set_level(logging.CRITICAL, "serving.engine")
    model, steps = parts
    dice = Random(1)
    places = cycle(["before", "in between", "after"])
    faults = list(zip(sorted(dice.sample(range(5, 110), 10)), places, strict=False))
    asked = [
        replace(request, id=f"{request.id}/{i}", caller=f"caller{i % 4}")
        for i, request in enumerate(requests() * 6)
    ][:32]

    def run(num_quiet: int) -> tuple[dict[tuple[str, int], list[int]], Engine]:
        runner = Runner(model, steps)
        name, count = starting(runner._launcher), itertools.count()
        walk = getattr(runner._launcher, name)

        def failing(inputs: StepInputs) -> Any:
            number, place = next(count), None
            # Not while a suspect is alone, which would end it.
            if len(faults) > num_quiet and number >= faults[0][0] and not engine.scheduler.suspects:
                place = faults.pop(0)[1]
            if place == "before":
                raise RuntimeError(place)
            walked = walk(inputs)
            if place == "in between":
                runner._launcher._layers[1].delete()
            if place is not None:
                raise RuntimeError(place)
            return walked

        setattr(runner._launcher, name, failing)
        engine = Engine(runner, LIMITS)
        worker = EngineWorker(engine, Metrics("tiny"))
        worker.start()
        tokens: dict[tuple[str, int], list[int]] = {}

        async def stream(request: Request) -> None:
            async with aclosing(worker.submit(request)) as events:
                async for event in events:
                    if event.drawn is not None:
                        answer = tokens.setdefault((request.id, event.choice), [])
                        answer.append(event.drawn.token_id)

        async def all_streams() -> None:
            await asyncio.gather(*map(stream, asked))

        asyncio.run(all_streams())
        worker.stop()
        assert engine.scheduler.num_free_pages == LIMITS.num_pages
        return tokens, engine

    wanted, quiet = run(num_quiet=10)
    tokens, engine = run(num_quiet=0)
    assert (quiet.num_failures, engine.num_failures) == (0, 10)
    assert tokens == wanted and len(tokens) == 32 + 5
