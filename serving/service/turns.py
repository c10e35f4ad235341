"""Turns: the few threads that tokenize or compile, which callers take in turn.

Tokenizing a long prompt takes a second, and compiling a grammar up to two. In threads of its own it
delays neither the event loop nor what the default executor does, and a caller with many long
prompts delays another's prompt by the one that its thread is at.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

_Result = TypeVar("_Result")
_THREADS = 3


class Turns:
    """Runs functions in a few threads; callers take turns, and none of them holds every thread.

    To be used in one event loop.

    Args:
        threads: Number of threads, at least 2.
        limit: Most threads of one caller; None for all but one.
        name: What they do.
    """

    def __init__(
        self, threads: int = _THREADS, limit: int | None = None, name: str = "tokenize"
    ) -> None:
        assert threads >= 2, threads
        self._threads = threads
        self._limit = threads - 1 if limit is None else limit
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._busy: Counter[str] = Counter()  # threads of each caller
        # The callers with work that waits, in the order of their turns.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def run(self, caller: str, work: Callable[[], _Result]) -> _Result:
        """Returns what `work` returns, or raises what it raises.

        If this is cancelled, work that has begun goes on, and holds its thread to its end.
        """
        await self._take_thread(caller)
        loop = asyncio.get_running_loop()

        def give_back(job: object) -> None:
            with suppress(RuntimeError):  # the loop is closed at the end of the process
                loop.call_soon_threadsafe(self._give_back, caller)

        job = self._executor.submit(work)
        job.add_done_callback(give_back)
        return await asyncio.wrap_future(job)

    async def _take_thread(self, caller: str) -> None:
        """Waits for a thread, which `_give_back` then frees."""
        if self._may_take(caller):
            self._busy[caller] += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had its thread already
                self._give_back(caller)
            raise

    def _may_take(self, caller: str) -> bool:
        return self._busy.total() < self._threads and self._busy[caller] < self._limit

    def _give_back(self, caller: str) -> None:
        """Frees a thread of a caller, and gives it to the next caller in turn."""
        self._busy[caller] -= 1
        if not self._busy[caller]:
            del self._busy[caller]
        for following in tuple(self._waiting):
            turns = self._waiting[following]
            is_served = False
            while turns and not is_served and self._may_take(following):
                turn = turns.popleft()
                if not turn.done():  # else its call was cancelled
                    self._busy[following] += 1
                    turn.set_result(None)
                    is_served = True
            if is_served or not turns:
                del self._waiting[following]
                if turns:
                    self._waiting[following] = turns  # behind the others
