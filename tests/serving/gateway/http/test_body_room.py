"""Room for large bodies: what a caller may hold, who waits, and who is refused."""

import asyncio

import pytest

from serving.errors import Overloaded
from serving.gateway.http import body_room
from serving.gateway.http.body_room import BodyRoom


class Holder:
    """A body that takes its room in a task of its own, and keeps it until `end`."""

    def __init__(self, room: BodyRoom, caller: str, size: int) -> None:
        self.has_room = False
        self._end = asyncio.Event()
        self.task = asyncio.create_task(self._hold(room, caller, size))

    async def _hold(self, room: BodyRoom, caller: str, size: int) -> None:
        hold = room.hold(caller)
        await hold.take(size)
        self.has_room = hold.has_room
        try:
            await self._end.wait()
        finally:
            hold.free()
            hold.free()  # does nothing
            self.has_room = hold.has_room

    async def end(self) -> None:
        self._end.set()
        await self.task
        await settled()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def holders(room: BodyRoom, caller: str, sizes: list[int]) -> list[Holder]:
    bodies = [Holder(room, caller, size) for size in sizes]
    await settled()
    return bodies


def held(bodies: list[Holder]) -> list[bool]:
    return [body.has_room for body in bodies]


def test_a_caller_has_half_of_the_room_and_another_has_some_all_the_same() -> None:
    async def test() -> None:
        room = BodyRoom(80)
        first = await holders(room, "first", [10] * 6)
        assert held(first) == [True] * 4 + [False] * 2  # 40 of 80 are as many as are free
        second = await holders(room, "second", [10] * 3)
        assert held(second) == [True, True, False]  # 20 of the 40, and 20 are free
        third = await holders(room, "third", [10] * 2)
        assert held(third) == [True, False]  # 10 of the 20, and 10 are free
        # What the first gives back goes to the one of whom least is held, and not to itself.
        await first[0].end()
        assert held(first) == [False, True, True, True, False, False]
        assert held(second + third) == [True, True, False, True, True]
        await first[1].end()
        assert held(second) == [True, True, False]  # 20 of them, and 20 are free
        await first[2].end()
        assert held(first) == [False, False, False, True, True, False]  # its turn: 20 of 30
        for body in (*first, *second, *third):
            body.task.cancel()

    asyncio.run(test())


def test_all_that_wait_have_their_turn_and_all_room_comes_back() -> None:
    async def test() -> None:
        room = BodyRoom(80)
        bodies = await holders(room, "first", [10] * 20) + await holders(room, "second", [10] * 20)
        while bodies:
            running = [body for body in bodies if body.has_room]
            assert running and sum(10 for _ in running) <= 80
            await running[0].end()
            bodies.remove(running[0])
        assert held(await holders(room, "third", [10] * 5)) == [True] * 4 + [False]

    asyncio.run(test())


def test_a_body_that_waits_no_longer_keeps_nothing() -> None:
    async def test() -> None:
        room = BodyRoom(80)
        (large,) = await holders(room, "first", [30])
        (waiting,) = await holders(room, "first", [30])
        (behind,) = await holders(room, "first", [5])
        assert held([large, waiting, behind]) == [True, False, False]  # first come, first served
        waiting.task.cancel()
        await settled()
        assert behind.has_room
        # Cancelled in the moment in which it had its room.
        (last,) = await holders(room, "first", [30])
        assert not last.has_room
        await behind.end()
        large._end.set()
        while not large.task.done():
            await asyncio.sleep(0)
        last.task.cancel()
        await settled()
        assert held(await holders(room, "first", [40])) == [True]

    asyncio.run(test())


def test_a_caller_with_too_many_that_wait_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_room, "_MAX_WAITING", 2)

    async def test() -> None:
        room = BodyRoom(20)
        await holders(room, "first", [10] * 3)
        with pytest.raises(Overloaded, match="large requests of yours"):
            await room.hold("first").take(10)
        assert not (await holders(room, "second", [10]))[0].task.done()

    asyncio.run(test())
