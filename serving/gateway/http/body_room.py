"""Room for large bodies: all that arrive, and all whose prompts the service has not yet queued.

A client that sends many large bodies slowly, or many that are refused in the end, would else fill
the memory within every other limit, and its work would stand before that of all others.
Callers share the room so that none of them keeps another out: a caller may hold as much as it would
leave free. So one has half of the room at most, two have a third each, and some is always free
(dynamic thresholds: A. K. Choudhury and E. L. Hahne, "Dynamic queue length thresholds for
shared-memory packet switches", IEEE/ACM Transactions on Networking 6(2), 1998).
"""

import asyncio
from collections import Counter, deque

from serving.errors import Overloaded

ROOM = 16 * 2**20
"""Bytes of all large bodies. What is under way takes its part of each pass of the event loop."""
SMALL = 2**16
"""Bytes of a body that needs no room: as many arrive before anybody reads them."""
_MAX_WAITING = 64  # bodies of one caller that wait for room; of each, SMALL and more has arrived


class Hold:
    """The room that one body holds. Call `free` when it is over, however it ends.

    Args:
        room: The room.
        caller: The name of the caller whose body it is.
    """

    def __init__(self, room: "BodyRoom", caller: str) -> None:
        self._room = room
        self._caller = caller
        self._size = 0

    @property
    def has_room(self) -> bool:
        """Returns whether there is room for the body."""
        return self._size > 0

    async def take(self, size: int) -> None:
        """Waits for room; raises Overloaded if too many bodies of the caller wait already.

        Args:
            size: The bytes that the body may have; less than half of all room.
        """
        assert not self._size
        await self._room._take(self._caller, size)
        self._size = size

    def free(self) -> None:
        """Gives the room back. May be called again."""
        if self._size:
            size, self._size = self._size, 0
            self._room._give(self._caller, size)


class BodyRoom:
    """Divides the room among callers. For use in one event loop.

    Args:
        num_bytes: The bytes of all bodies together.
    """

    def __init__(self, num_bytes: int = ROOM) -> None:
        self._free = num_bytes
        self._held: Counter[str] = Counter()  # bytes by caller
        # The bodies that wait, by caller in the order of their turns, first come first.
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}

    def hold(self, caller: str) -> "Hold":
        """Returns a hold of no room, for a body of the caller of that name."""
        return Hold(self, caller)

    async def _take(self, caller: str, size: int) -> None:
        waiting = self._waiting.get(caller, ())
        if not waiting and self._fits(caller, size):
            self._note(caller, size)
            return
        if len(waiting) >= _MAX_WAITING:
            raise Overloaded("too many large requests of yours wait already; try again shortly")
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._drop(caller, (size, turn))
            else:  # it had its room already
                self._give(caller, size)
            raise

    def _fits(self, caller: str, size: int) -> bool:
        return self._held[caller] + size <= self._free

    def _note(self, caller: str, size: int) -> None:
        self._held[caller] += size
        self._free -= size
        if not self._held[caller]:
            del self._held[caller]

    def _drop(self, caller: str, entry: tuple[int, asyncio.Future[None]]) -> None:
        self._waiting[caller].remove(entry)
        if not self._waiting[caller]:
            del self._waiting[caller]
        self._admit()  # a larger body may have kept smaller ones behind it

    def _give(self, caller: str, size: int) -> None:
        self._note(caller, -size)
        self._admit()

    def _admit(self) -> None:
        """Gives free room to bodies that wait, to one of each caller in turn."""
        goes_on = True
        while goes_on:
            goes_on = False
            for caller in tuple(self._waiting):
                size, turn = self._waiting[caller][0]
                if turn.cancelled():  # its task will drop it
                    continue
                if not self._fits(caller, size):
                    continue
                bodies = self._waiting.pop(caller)
                bodies.popleft()
                if bodies:
                    self._waiting[caller] = bodies  # behind the others
                self._note(caller, size)
                turn.set_result(None)
                goes_on = True
