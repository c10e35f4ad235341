"""Callers take turns at the threads that tokenize."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from serving.service.turns import Turns


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def test_a_caller_with_much_work_leaves_a_thread_to_others() -> None:
    """Alice's first two pieces stand still in two of three threads; her third waits, Bob's runs."""

    async def run() -> None:
        turns, gate, order = Turns(3), threading.Event(), []

        def work(name: str) -> Callable[[], str]:
            def held() -> str:
                order.append(name)
                gate.wait(10)
                return name

            return held

        async with asyncio.timeout(10):
            alice = [asyncio.create_task(turns.run("alice", work(f"a{i}"))) for i in range(4)]
            await until(lambda: len(order) == 2)
            assert await turns.run("bob", lambda: "at once") == "at once"
            assert sorted(order) == ["a0", "a1"]  # each in a thread of its own
            gate.set()
            assert await asyncio.gather(*alice) == ["a0", "a1", "a2", "a3"]

    asyncio.run(run())


def test_a_caller_has_no_more_threads_than_it_may() -> None:
    """Of four threads Alice has one, in which she stands still; Bob's and Carol's work runs."""

    async def run() -> None:
        turns, gate, running = Turns(4, limit=1), threading.Event(), []

        def held() -> None:
            running.append("alice")
            gate.wait(10)

        async with asyncio.timeout(10):
            alice = [asyncio.create_task(turns.run("alice", held)) for _ in range(30)]
            await until(lambda: bool(running))
            for name in ("bob", "carol", "bob"):
                assert await turns.run(name, lambda name=name: name) == name
            assert running == ["alice"]
            gate.set()
            await asyncio.gather(*alice)
            assert len(running) == 30

    asyncio.run(run())


def test_callers_take_turns() -> None:
    """In the only thread that is free: a, b, a, b, a, although all of a came first."""

    async def run() -> None:
        turns, gate, end, order = Turns(2), threading.Event(), threading.Event(), []
        async with asyncio.timeout(20):
            held = asyncio.create_task(turns.run("x", lambda: end.wait(10)))
            begun = asyncio.create_task(turns.run("y", lambda: gate.wait(10)))
            await asyncio.sleep(0)
            waiting = [
                asyncio.create_task(turns.run(name[0], lambda name=name: order.append(name)))
                for name in ("a1", "a2", "a3", "b1", "b2")
            ]
            await asyncio.sleep(0)
            gate.set()
            await asyncio.gather(begun, *waiting)
            end.set()
            await held
        assert order == ["a1", "b1", "a2", "b2", "a3"]

    asyncio.run(run())


def test_work_that_is_given_up_gives_its_thread_back() -> None:
    async def run() -> None:
        turns, gate, is_at_work = Turns(2), threading.Event(), threading.Event()

        def held() -> None:
            is_at_work.set()
            gate.wait(10)

        async with asyncio.timeout(10):
            begun = asyncio.create_task(turns.run("a", held))
            waiting = asyncio.create_task(turns.run("a", lambda: None))
            await until(is_at_work.is_set)
            for task in (begun, waiting):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            later = asyncio.create_task(turns.run("a", lambda: "done"))
            await asyncio.sleep(0.01)
            assert not later.done()  # the thread of the first one is still at work
            gate.set()
            assert await later == "done"
            assert not turns._busy and not turns._waiting

    asyncio.run(run())


def test_what_work_raises_is_raised_to_its_caller_alone() -> None:
    async def run() -> None:
        turns = Turns(2)
        with pytest.raises(ZeroDivisionError):
            await turns.run("a", lambda: 1 / 0)
        assert await turns.run("a", lambda: 2) == 2

    asyncio.run(run())
