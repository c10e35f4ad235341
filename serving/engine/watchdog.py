"""Watchdog: notices that a step of the engine does not end.

It runs in the event loop, apart from the engine's thread, because a step may wait for ever: in a
collective whose other side is gone, or in a driver. Where the whole process stands still, so does
this loop; its parent notices that, because the beats stay away (serving/parent.py).

All programs are compiled before the engine's thread is started, so no step waits for a compiler.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

_BEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.25


async def until_stuck(
    standing: Callable[[float], float],
    seconds: float,
    beat: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Returns when the engine's present turn has lasted for longer than `seconds`.

    Args:
        standing: Returns for how many seconds it has lasted at a time of the clock; 0 without work.
        seconds: Time that a turn may take.
        beat: Called at once and then every second, as long as all goes on.
        clock: Time in seconds that never goes back.
        sleep: Waits for a number of seconds.
    """
    beat_at = clock()
    while standing(now := clock()) <= seconds:
        if now >= beat_at:
            beat()
            beat_at = now + _BEAT_SECONDS
        await sleep(_LOOK_SECONDS)
