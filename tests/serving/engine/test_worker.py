"""Crash, drain, stop and deadlines, with an engine that can be worked out by hand."""

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

import pytest

from mixtral_jax.sampling_params import SamplingParams
from serving.engine.engine import Engine
from serving.engine.metrics import Metrics
from serving.engine.outlet import Item, Queued
from serving.engine.worker import EngineWorker
from serving.errors import ContextTooLong, DeadlineExceeded, EngineFailure, Overloaded, Unavailable
from serving.scheduling.request import Drawn, Event, FinishReason, Request
from serving.scheduling.step_plan import Limits
from tests.support.scripted_device import ScriptedDevice


class CountingEngine:
    """Answers every request with 0, 1, 2, ...; breaks at token 13, refuses an empty prompt.

    A prompt that begins with 99 meets an assertion when it is added.

    Choice i gives i tokens more than max_tokens. Events come a step late, as from a real engine.
    """

    def __init__(self) -> None:
        self.running: dict[str, tuple[Request, int]] = {}
        self.late: list[Event] = []
        self.cancelled: list[str] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.late)

    def add(self, request: Request) -> None:
        if not request.prompt_ids:
            raise ContextTooLong("no")
        assert request.prompt_ids[0] != 99
        self.running[request.id] = (request, 0)

    def has_room(self, n: int, caller: str) -> bool:
        return n <= 3 and caller != "greedy"

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        if choice is not None:
            self.cancelled.append(f"{request_id}/{choice}")
            return
        self.running.pop(request_id, None)
        self.late = [event for event in self.late if event.request_id != request_id]
        self.cancelled.append(request_id)

    def step(self, now: float) -> list[Event]:
        events, self.late = self.late, []
        for request, count in list(self.running.values()):
            if count == 13:
                raise RuntimeError("thirteen")
            lengths = [request.max_tokens + choice for choice in range(request.n)]
            self.running[request.id] = (request, count + 1)
            if request.deadline is not None and request.deadline < now:
                events += [
                    Event(
                        request_id=request.id,
                        choice=choice,
                        drawn=None,
                        finish_reason=FinishReason.DEADLINE,
                    )
                    for choice in range(request.n)
                ]
                self.cancel(request.id)
                continue
            self.late += [
                Event(
                    request_id=request.id,
                    choice=choice,
                    drawn=Drawn(token_id=count),
                    finish_reason=FinishReason.LENGTH if count + 1 == length else None,
                )
                for choice, length in enumerate(lengths)
                if count < length
            ]
            if count + 1 == max(lengths):
                del self.running[request.id]
        return events


def request(
    name: str,
    max_tokens: int,
    prompt: tuple[int, ...] = (1,),
    n: int = 1,
    deadline: float | None = None,
) -> Request:
    return Request(
        id=name,
        prompt_ids=prompt,
        sampling=SamplingParams(),
        max_tokens=max_tokens,
        eos_ids=frozenset(),
        n=n,
        deadline=deadline,
    )


async def happened(worker: EngineWorker, asked: Request) -> list[Event]:
    async with aclosing(worker.submit(asked)) as events:
        return [event async for event in events]


async def tokens(worker: EngineWorker, asked: Request) -> list[int]:
    return [event.drawn.token_id for event in await happened(worker, asked) if event.drawn]


def started() -> tuple[EngineWorker, CountingEngine]:
    engine = CountingEngine()
    worker = EngineWorker(engine, Metrics("tiny"))
    worker.start()
    return worker, engine


def test_requests_side_by_side() -> None:
    worker, _ = started()

    async def run() -> None:
        many = [tokens(worker, request(str(n), n)) for n in range(1, 6)]
        assert await asyncio.gather(*many) == [list(range(n)) for n in range(1, 6)]

    asyncio.run(run())
    worker.stop()


def test_an_assertion_in_one_request_ends_that_one_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker, _ = started()

    async def run() -> None:
        other = asyncio.create_task(tokens(worker, request("other", 9)))
        with pytest.raises(EngineFailure, match="the request failed; see the server's log"):
            await tokens(worker, request("bad", 3, prompt=(99,)))
        assert await other == list(range(9))
        assert await tokens(worker, request("next", 3)) == [0, 1, 2]

    asyncio.run(run())
    assert not worker.has_failed
    assert "could not take in request bad" in caplog.text
    worker.stop()


def test_the_engine_does_not_stand_still_while_it_has_no_work() -> None:
    worker, _ = started()
    assert asyncio.run(tokens(worker, request("a", 3))) == [0, 1, 2]
    deadline = time.monotonic() + 10
    while worker.standing(time.monotonic() + 100) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.standing(time.monotonic() + 100) == 0
    worker.stop()


class WatchedEngine(CountingEngine):
    """Notes, in each step, for how long its turn lasts at a time that is the same for all."""

    def __init__(self) -> None:
        super().__init__()
        self.worker: EngineWorker | None = None
        self.seen: list[float] = []

    def step(self, now: float) -> list[Event]:
        assert self.worker is not None
        self.seen.append(self.worker.standing(now))
        time.sleep(0.001)
        return super().step(now)


def test_a_turn_begins_with_each_step_also_when_nobody_comes() -> None:
    engine = WatchedEngine()
    engine.worker = worker = EngineWorker(engine, Metrics("tiny"))
    worker.start()
    assert asyncio.run(tokens(worker, request("a", 9))) == list(range(9))
    worker.stop()
    assert len(engine.seen) >= 9 and set(engine.seen) == {0.0}


def test_a_request_lasts_until_its_last_choice_has_ended() -> None:
    worker, engine = started()

    async def run() -> None:
        events = await happened(worker, request("a", 2, n=3))
        assert [(e.choice, e.drawn.token_id, e.finish_reason is not None) for e in events] == [
            (0, 0, False),
            (1, 0, False),
            (2, 0, False),
            (0, 1, True),
            (1, 1, False),
            (2, 1, False),
            (1, 2, True),
            (2, 2, False),
            (2, 3, True),
        ]

    asyncio.run(run())
    worker.stop()
    assert not worker._answers and not engine.cancelled


def test_the_deadline_of_one_choice_ends_the_request_and_no_other() -> None:
    worker, _ = started()

    async def run() -> None:
        late = request("late", 12, n=3, deadline=time.monotonic() - 1)
        other = asyncio.create_task(tokens(worker, request("b", 9)))
        with pytest.raises(DeadlineExceeded, match="deadline passed"):
            await tokens(worker, late)
        assert await other == list(range(9))
        timely = request("timely", 3, n=1, deadline=time.monotonic() + 60)
        assert await tokens(worker, timely) == [0, 1, 2]

    asyncio.run(run())
    worker.stop()
    assert not worker._answers


class AskedEngine(CountingEngine):
    """Notes how many choices `has_room` asks for just after a request was queued."""

    def __init__(self) -> None:
        super().__init__()
        self.worker: EngineWorker | None = None
        self.asked: list[int] = []

    def add(self, request: Request) -> None:
        super().add(request)
        assert self.worker is not None
        self.worker.has_room(1, request.caller)

    def has_room(self, n: int, caller: str) -> bool:
        self.asked.append(n)
        return True


def test_what_is_queued_is_not_counted_as_unread_too() -> None:
    engine = AskedEngine()
    engine.worker = worker = EngineWorker(engine, Metrics("tiny"))
    worker.start()
    assert asyncio.run(tokens(worker, request("a", 2))) == [0, 1]
    worker.stop()
    assert engine.asked == [1]


class StrictEngine(CountingEngine):
    """Tells that the deadline of the last choice alone has passed, as soon as it has work."""

    def step(self, now: float) -> list[Event]:
        return [
            Event(
                request_id=asked.id,
                choice=asked.n - 1,
                drawn=None,
                finish_reason=FinishReason.DEADLINE,
            )
            for asked, _ in self.running.values()
        ]


def test_a_deadline_frees_what_the_other_choices_hold() -> None:
    engine = StrictEngine()
    worker = EngineWorker(engine, Metrics("tiny"))
    worker.start()
    with pytest.raises(DeadlineExceeded):
        asyncio.run(tokens(worker, request("late", 5, n=3)))
    worker.stop()
    assert engine.cancelled == ["late"] and not engine.running


class PoisonedEngine(CountingEngine):
    """Says of every request with two choices that it has failed, in the step after its first."""

    def step(self, now: float) -> list[Event]:
        bad = [asked.id for asked, count in self.running.values() if asked.n == 2 and count]
        failed = [
            Event(request_id=name, choice=0, drawn=None, finish_reason=FinishReason.FAILED)
            for name in bad
        ]
        return failed + super().step(now)


def test_a_request_that_failed_alone_ends_alone() -> None:
    engine = PoisonedEngine()
    worker = EngineWorker(engine, Metrics("tiny"))
    worker.start()

    async def run() -> None:
        other = asyncio.create_task(tokens(worker, request("other", 9)))
        with pytest.raises(EngineFailure, match="failed on this request"):
            await tokens(worker, request("bad", 5, n=2))
        assert await other == list(range(9))

    asyncio.run(run())
    worker.stop()
    assert engine.cancelled == ["bad"] and not worker.has_failed


class ReadingEngine(CountingEngine):
    """Tells, before the first token, that it has computed 2 tokens of the prompt."""

    def step(self, now: float) -> list[Event]:
        read = [
            Event(request_id=name, choice=0, drawn=None, finish_reason=None, computed=2)
            for name, (_, count) in self.running.items()
            if count == 0
        ]
        return super().step(now) + read


def test_progress_of_a_prompt_is_passed_on_and_is_no_token() -> None:
    metrics = Metrics("tiny")
    worker = EngineWorker(ReadingEngine(), metrics)
    worker.start()
    events = asyncio.run(happened(worker, request("a", 3)))
    worker.stop()
    assert [(e.computed, e.drawn and e.drawn.token_id) for e in events] == [
        (2, None),
        (0, 0),
        (0, 1),
        (0, 2),
    ]
    value = metrics.registry.get_sample_value
    label = {"model_name": "tiny"}
    assert value("vllm:generation_tokens_total", label) == 3
    assert value("vllm:time_to_first_token_seconds_count", label) == 1
    assert value("vllm:inter_token_latency_seconds_count", label) == 2


def test_a_request_is_accepted_when_the_engine_has_queued_it() -> None:
    worker, engine = started()

    async def run() -> None:
        async with aclosing(worker.submit(request("a", 2))) as events:
            await events.accepted()
            await events.accepted()
            assert [event.drawn async for event in events] == [Drawn(token_id=i) for i in (0, 1)]
        refused = worker.submit(request("b", 1, prompt=()))
        with pytest.raises(ContextTooLong):
            await refused.accepted()
        assert [event async for event in refused] == []  # it has ended
        unused = worker.submit(request("c", 1))
        await unused.aclose()
        assert worker.num_under_way == 0

    asyncio.run(run())
    worker.stop()
    assert engine.cancelled == [] and not worker.num_under_way and not worker._unread


def test_what_the_engine_refuses_reaches_the_caller_alone() -> None:
    worker, _ = started()

    async def run() -> None:
        with pytest.raises(ContextTooLong):
            await tokens(worker, request("a", 1, prompt=()))
        assert await tokens(worker, request("b", 2)) == [0, 1]

    asyncio.run(run())
    worker.stop()


def test_a_crash_ends_all_requests_and_every_later_one() -> None:
    worker, _ = started()

    async def run() -> None:
        outcomes = await asyncio.gather(
            *(tokens(worker, request(str(n), 100)) for n in range(3)), return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [EngineFailure] * 3
        with pytest.raises(EngineFailure):
            await tokens(worker, request("late", 1))

    asyncio.run(run())
    assert worker.has_failed and worker.ended.is_set()
    worker.stop()


def test_leaving_cancels() -> None:
    worker, engine = started()

    async def run() -> None:
        async with aclosing(worker.submit(request("a", 12))) as events:
            async for _ in events:
                break
        assert await tokens(worker, request("b", 1)) == [0]
        assert "a" not in engine.running

    asyncio.run(run())
    worker.stop()


class HeldEngine(CountingEngine):
    """Stops after two steps until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.released = threading.Event()

    def step(self, now: float) -> list[Event]:
        self.steps += 1
        if self.steps > 2:
            assert self.released.wait(10)
        return super().step(now)


def test_a_choice_that_was_ended_is_computed_no_more_and_not_waited_for() -> None:
    engine = HeldEngine()
    worker = EngineWorker(engine, Metrics("tiny"))
    worker.start()

    async def run() -> None:
        seen = []
        async with aclosing(worker.submit(request("a", 12, n=2))) as events:
            async for event in events:
                seen.append(event.choice)
                if event.choice == 1 and 1 not in seen[:-1]:
                    worker.end("a", 1)
                    engine.released.set()
                    assert worker.num_under_way == 1
        assert seen.count(0) == 12
        assert worker.num_under_way == 0
        assert await tokens(worker, request("b", 1)) == [0]

    asyncio.run(run())
    worker.stop()
    assert engine.cancelled == ["a/1"]
    assert not worker._answers


def test_room_counts_the_choices_that_the_engine_has_not_taken_in() -> None:
    engine = HeldEngine()
    engine.steps = 2
    worker = EngineWorker(engine, Metrics("tiny"))

    async def run() -> None:
        assert worker.has_room(3, "bob") and not worker.has_room(4, "bob")
        assert not worker.has_room(1, "greedy")
        asked = [replace(request(n, 2), caller="bob") for n in ("a", "b")]
        answers = [asyncio.create_task(tokens(worker, each)) for each in asked]
        await asyncio.sleep(0)  # both are in the inbox of a thread that does not run yet
        assert worker.has_room(1, "bob") and not worker.has_room(2, "bob")
        assert worker.has_room(3, "eve")
        worker.start()
        engine.released.set()
        assert await asyncio.gather(*answers) == [[0, 1], [0, 1]]
        assert worker.has_room(3, "bob")

    asyncio.run(run())
    worker.stop()


class NotedOutlet:
    """Notes each call: the requests, and the ids of their tokens or what else has happened."""

    def __init__(self) -> None:
        self.turns: list[list[tuple[str, object]]] = []
        self.has_ended = threading.Event()

    def put(self, items: Sequence[Item]) -> None:
        self.turns.append([])
        for name, item in items:
            what: object = item
            if isinstance(item, Event):
                what = item.drawn and item.drawn.token_id
                if item.finish_reason is not None and name == "last":
                    self.has_ended.set()
            self.turns[-1].append((name, what))


def test_an_outlet_gets_a_turn_at_once_and_another_one_nothing_of_it() -> None:
    worker = EngineWorker(CountingEngine(), Metrics("tiny"))
    first, other = NotedOutlet(), NotedOutlet()
    worker.send(request("a", 2), first)
    worker.send(request("b", 1), other)
    worker.send(request("last", 3), first)
    refused = request("refused", 1, prompt=())
    worker.send(refused, first)
    worker.start()
    assert first.has_ended.wait(10)
    worker.stop()
    queued, *steps = first.turns
    assert queued[:2] == [("a", Queued.QUEUED), ("last", Queued.QUEUED)]
    assert queued[2][0] == "refused" and isinstance(queued[2][1], ContextTooLong)
    assert steps == [[("a", 0), ("last", 0)], [("a", 1), ("last", 1)], [("last", 2)]]
    assert other.turns == [[("b", Queued.QUEUED)], [("b", 0)]]
    with pytest.raises(Unavailable):
        worker.send(request("late", 1), first)


class SlowEngine(CountingEngine):
    """Never ends, and takes its time."""

    def step(self, now: float) -> list[Event]:
        time.sleep(0.02)
        self.running = {name: (asked, 0) for name, (asked, _) in self.running.items()}
        return super().step(now)


def test_draining_refuses_new_requests_and_stopping_ends_the_others() -> None:
    worker = EngineWorker(SlowEngine(), Metrics("tiny"))
    worker.start()

    async def run() -> None:
        seen = []
        async with aclosing(worker.submit(request("a", 5))) as events:
            with pytest.raises(Unavailable, match="was stopped"):
                async for event in events:
                    seen.append(event)
                    if len(seen) == 3:
                        worker.drain()
                        with pytest.raises(Unavailable, match="shutting down"):
                            await tokens(worker, request("late", 1))
                    if len(seen) == 5:  # those under way go on until the end
                        await asyncio.to_thread(worker.stop)

    asyncio.run(run())
    assert worker.ended.is_set() and not worker.has_failed


def test_a_crash_with_a_better_reason_is_told_with_that() -> None:
    lost = Unavailable("a part was lost")
    worker = EngineWorker(CountingEngine(), Metrics("tiny"), lambda: lost)
    worker.start()
    with pytest.raises(Unavailable, match="a part was lost"):
        asyncio.run(tokens(worker, request("a", 100)))
    assert not worker.has_failed
    worker.stop()


class StuckEngine(CountingEngine):
    """Its second step does not end until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.released = threading.Event()

    def step(self, now: float) -> list[Event]:
        self.steps += 1
        if self.steps == 2:
            self.released.wait(20)
        return super().step(now)


def test_requests_can_be_ended_while_the_engine_is_stuck() -> None:
    engine = StuckEngine()
    worker = EngineWorker(engine, Metrics("tiny"))
    worker.start()

    async def run() -> None:
        under_way = [asyncio.create_task(tokens(worker, request(n, 9))) for n in ("a", "b")]
        while engine.steps < 2:
            await asyncio.sleep(0.01)
        assert worker.standing(time.monotonic() + 100) > 99
        assert worker.step_seconds() > 0
        in_the_inbox = asyncio.create_task(tokens(worker, request("c", 9)))
        await asyncio.sleep(0.01)
        worker.abandon(Unavailable("a part was lost"))
        ended = asyncio.gather(*under_way, in_the_inbox, return_exceptions=True)
        outcomes = await asyncio.wait_for(ended, 5)
        assert [str(outcome) for outcome in outcomes] == ["a part was lost"] * 3
        with pytest.raises(Unavailable, match="shutting down"):
            await tokens(worker, request("late", 1))

    asyncio.run(run())
    assert worker.ended.is_set() and not worker.has_failed
    assert worker.standing(time.monotonic() + 100) == 0
    engine.released.set()
    worker.stop()


def test_a_storm_of_requests_that_are_left_at_once_leaves_nothing_behind() -> None:
    """A part before the engine has seen them, a part in mid-answer (soak: 10,000)."""
    limits = Limits(
        num_pages=64,
        page_size=4,
        max_sequences=8,
        max_step_tokens=16,
        max_context=96,
        max_waiting=64,
    )
    engine = Engine(ScriptedDevice(limits), limits)
    worker = EngineWorker(engine, Metrics("toy"))
    worker.start()
    outcomes: list[str] = []
    count = 10_000 if "MIXTRAL_JAX_SOAK" in os.environ else 3_000

    async def leave(number: int) -> None:
        name = f"caller{number % 4}"
        asked = replace(request(str(number), 20, prompt=(1, 2, number % 90)), caller=name)
        async with aclosing(worker.submit(asked)) as events:
            if number % 3 == 0:
                waiting = asyncio.ensure_future(anext(events))
                await asyncio.sleep(0)  # it is in the inbox
                waiting.cancel()
                await asyncio.wait([waiting])
                outcomes.append("unseen")
                return
            try:
                await events.accepted()
                if number % 3 == 1:
                    await anext(events)
                outcomes.append("seen")
            except Overloaded:
                outcomes.append("refused")

    async def run() -> None:
        for start in range(0, count, 100):
            await asyncio.gather(*map(leave, range(start, start + 100)))
        bystander = request("bystander", 5)
        assert len(await tokens(worker, bystander)) == 5

    asyncio.run(run())
    assert len(outcomes) == count and outcomes.count("seen") > 100
    worker.stop()
    scheduler = engine.scheduler
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert scheduler.num_free_pages == limits.num_pages
    assert not worker._answers and not worker.num_under_way and not worker._unread
    assert worker._inbox.empty() and not worker.has_failed
