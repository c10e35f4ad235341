"""Turns: whose work comes next where several callers wait for a few workers.

One caller has one worker at a time, and of those that wait the caller comes next that has used the
least time of late: a caller whose grammars take seconds holds up its own requests first.
"""

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

Job = TypeVar("Job")

_HALF_LIFE = 30.0  # seconds after which half of the time that a caller used is forgotten
_MOST_REMEMBERED = 1024  # callers


class Turns(Generic[Job]):
    """A queue by caller. Thread-safe.

    Args:
        clock: seconds, of any beginning.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: OrderedDict[bytes, deque[Job]] = OrderedDict()
        self._busy: set[bytes] = set()
        self._used: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # seconds, when
        self._is_closed = False

    def put(self, caller: bytes, job: Job) -> None:
        """Adds a job. Raises RuntimeError after `close`."""
        with self._changed:
            if self._is_closed:
                raise RuntimeError("closed")
            self._waiting.setdefault(caller, deque()).append(job)
            self._changed.notify()

    def take(self) -> tuple[bytes, Job] | None:
        """Waits for a job and returns it with its caller, who has no other until `finish`; None
        after `close`."""
        with self._changed:
            while not self._is_closed:
                free = [caller for caller in self._waiting if caller not in self._busy]
                if free:
                    caller = min(free, key=self._recent)
                    jobs = self._waiting[caller]
                    job = jobs.popleft()
                    if not jobs:
                        del self._waiting[caller]
                    self._busy.add(caller)
                    return caller, job
                self._changed.wait()
        return None

    def finish(self, caller: bytes, seconds: float) -> None:
        """Ends a job, which took that many seconds."""
        with self._changed:
            self._busy.remove(caller)
            self._used[caller] = (self._recent(caller) + seconds, self._clock())
            self._used.move_to_end(caller)
            while len(self._used) > _MOST_REMEMBERED:
                self._used.popitem(last=False)
            self._changed.notify()

    def close(self) -> list[Job]:
        """Lets every `take` return None. Returns the jobs that nobody took."""
        with self._changed:
            self._is_closed = True
            jobs = [job for jobs in self._waiting.values() for job in jobs]
            self._waiting.clear()
            self._changed.notify_all()
            return jobs

    def _recent(self, caller: bytes) -> float:
        """Returns the seconds that a caller used of late."""
        used, when = self._used.get(caller, (0.0, 0.0))
        return used * math.exp2((when - self._clock()) / _HALF_LIFE)
