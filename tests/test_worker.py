"""Crash, drain and stop, with an engine that can be worked out by hand."""

import asyncio
from contextlib import aclosing

import pytest

from serving.errors import ContextTooLong, EngineFailure, ServingError, Unavailable
from serving.request import Event, FinishReason, Request, SamplingParams
from serving.worker import EngineWorker


class CountingEngine:
    """Answers every request with 0, 1, 2, ...; breaks at token 13, refuses an empty prompt."""

    def __init__(self) -> None:
        self.running: dict[str, tuple[Request, int]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add(self, request: Request) -> None:
        if not request.prompt_ids:
            raise ContextTooLong("no")
        self.running[request.id] = (request, 0)

    def cancel(self, request_id: str) -> None:
        self.running.pop(request_id, None)

    def step(self) -> list[Event]:
        events = []
        for request, count in list(self.running.values()):
            if count == 13:
                raise RuntimeError("thirteen")
            last = count + 1 == request.max_tokens
            reason = FinishReason.LENGTH if last else None
            events.append(Event(request_id=request.id, token_id=count, finish_reason=reason))
            self.running[request.id] = (request, count + 1)
            if last:
                del self.running[request.id]
        return events


def request(name: str, max_tokens: int, prompt: tuple[int, ...] = (1,)) -> Request:
    return Request(
        id=name,
        prompt_ids=prompt,
        sampling=SamplingParams(),
        max_tokens=max_tokens,
        eos_ids=frozenset(),
    )


async def tokens(worker: EngineWorker, asked: Request) -> list[int]:
    async with aclosing(worker.submit(asked)) as events:
        return [event.token_id async for event in events]


def started() -> tuple[EngineWorker, CountingEngine]:
    engine = CountingEngine()
    worker = EngineWorker(engine)  # type: ignore[arg-type]
    worker.start()
    return worker, engine


def test_requests_side_by_side() -> None:
    worker, _ = started()

    async def run() -> None:
        many = [tokens(worker, request(str(n), n)) for n in range(1, 6)]
        assert await asyncio.gather(*many) == [list(range(n)) for n in range(1, 6)]

    asyncio.run(run())
    worker.stop()


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


def test_draining_refuses_new_requests_and_stopping_ends_the_others() -> None:
    worker, _ = started()

    async def run() -> list[ServingError | list[int]]:
        worker.drain()
        with pytest.raises(Unavailable, match="shutting down"):
            await tokens(worker, request("late", 1))
        return []

    asyncio.run(run())
    worker.stop()
    assert not worker.has_failed
