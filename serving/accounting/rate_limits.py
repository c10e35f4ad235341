"""How much each caller may ask in a minute: requests, and tokens of prompts and answers.

A caller has a bucket of each, which holds a minute's worth and fills up evenly. A request takes its
one at once; its tokens are taken when they are known, which is afterwards, so that a bucket of
tokens can be in debt: its caller waits until it is not. The figures are those of one process: two
gateways allow twice as much.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from serving.errors import Overloaded

_MOST_CALLERS = 10_000  # remembered, before those who asked nothing of late are forgotten


@dataclass
class _Bucket:
    """So many a minute, and no more than a minute's worth at once."""

    per_minute: float
    level: float
    at: float  # when that was the level

    def fill(self, now: float) -> None:
        gained = (now - self.at) * self.per_minute / 60
        self.level = min(self.per_minute, self.level + gained)
        self.at = now

    def wait(self, level: float) -> float:
        """Seconds until there is so much, from the time of `fill` on."""
        # What rounding took from a bucket shall not make anybody wait.
        return max(0.0, (level - 1e-9 - self.level) * 60 / self.per_minute)


class Rates:
    """Lets callers ask, or tells them how long to wait. Used by one thread.

    Args:
        requests_per_minute: of each caller; None: as many as they like.
        tokens_per_minute: the same for tokens.
        clock: The time, as time.monotonic() tells it.
    """

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}  # (caller, "requests" or "tokens")

    def admit(self, caller: str) -> None:
        """Takes a request. Raises Overloaded, with the true wait, and takes nothing."""
        requests, tokens = self._bucket(caller, "requests"), self._bucket(caller, "tokens")
        # Tokens only need to be out of debt: how many the request will take is not known yet.
        waits = {
            "requests": requests.wait(1) if requests else 0.0,
            "tokens": tokens.wait(0) if tokens else 0.0,
        }
        what = max(waits, key=lambda name: waits[name])
        if waits[what] > 0:
            seconds = math.ceil(waits[what])
            raise Overloaded(
                f"this key may use {self._limits[what]} {what} a minute; "
                f"try again in {seconds} seconds",
                retry_after=seconds,
            )
        if requests:
            requests.level -= 1

    def charge(self, caller: str, tokens: int) -> None:
        """Takes the tokens of an answer, also more than there are."""
        bucket = self._bucket(caller, "tokens")
        if bucket:
            bucket.level -= tokens

    def _bucket(self, caller: str, what: str) -> _Bucket | None:
        limit = self._limits[what]
        if limit is None:
            return None
        now = self._clock()
        bucket = self._buckets.get((caller, what))
        if bucket is None:
            self._forget(now)
            bucket = self._buckets[caller, what] = _Bucket(limit, limit, now)
        bucket.fill(now)
        return bucket

    def _forget(self, now: float) -> None:
        """Drops the full buckets, which are as good as none, when there are very many."""
        if len(self._buckets) < _MOST_CALLERS:
            return
        for bucket in self._buckets.values():
            bucket.fill(now)
        self._buckets = {
            key: bucket for key, bucket in self._buckets.items() if bucket.level < bucket.per_minute
        }
