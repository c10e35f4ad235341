"""Limits of what each caller may ask in a minute: requests, and tokens of prompts and answers.

A caller has two token buckets, one for requests and one for tokens. Each holds a minute's worth and
fills up evenly. A request is taken when it is admitted. Its tokens are taken afterwards, when their
number is known, so that this bucket can be in debt: its caller waits until it is not. The limits
hold for one process: two gateways together allow twice as much.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from serving.errors import Overloaded

# Above this number of callers, those whose buckets are full again are forgotten.
_MAX_CALLERS = 10_000


@dataclass
class _Bucket:
    """A token bucket that holds at most one minute's worth."""

    per_minute: float
    level: float
    at: float  # the clock when that was the level

    def fill(self, now: float) -> None:
        gained = (now - self.at) * self.per_minute / 60
        self.level = min(self.per_minute, self.level + gained)
        self.at = now

    def wait(self, level: float) -> float:
        """Returns the seconds until the bucket holds `level`, counted from the last `fill`."""
        # The tolerance is for rounding errors, which must not make anybody wait.
        return max(0.0, (level - 1e-9 - self.level) * 60 / self.per_minute)


class RateLimits:
    """Limits every caller to so many requests and tokens a minute. For use in one thread.

    Args:
        requests_per_minute: The limit of each caller; None means no limit.
        tokens_per_minute: The limit of each caller in tokens; None means no limit.
        clock: Returns seconds, like time.monotonic.
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

    def take_request(self, caller: str) -> None:
        """Takes a request; or raises Overloaded with the true wait, and takes nothing."""
        requests, tokens = self._bucket(caller, "requests"), self._bucket(caller, "tokens")
        # The number of the request's tokens is not known yet: the bucket need only have no debt.
        waits = {
            "requests": requests.wait(1) if requests else 0.0,
            "tokens": tokens.wait(0) if tokens else 0.0,
        }
        unit = max(waits, key=lambda name: waits[name])
        if waits[unit] > 0:
            seconds = math.ceil(waits[unit])
            raise Overloaded(
                f"this key may use {self._limits[unit]} {unit} a minute; "
                f"try again in {seconds} seconds",
                retry_after=seconds,
            )
        if requests:
            requests.level -= 1

    def take_tokens(self, caller: str, tokens: int) -> None:
        """Takes the tokens of an answer, even if the bucket holds fewer."""
        bucket = self._bucket(caller, "tokens")
        if bucket:
            bucket.level -= tokens

    def _bucket(self, caller: str, unit: str) -> _Bucket | None:
        """Returns the caller's bucket of "requests" or "tokens", filled; None without a limit."""
        limit = self._limits[unit]
        if limit is None:
            return None
        now = self._clock()
        bucket = self._buckets.get((caller, unit))
        if bucket is None:
            self._forget(now)
            bucket = self._buckets[caller, unit] = _Bucket(limit, limit, now)
        bucket.fill(now)
        return bucket

    def _forget(self, now: float) -> None:
        """Drops the full buckets, which are the same as none, when there are very many."""
        if len(self._buckets) < _MAX_CALLERS:
            return
        for bucket in self._buckets.values():
            bucket.fill(now)
        self._buckets = {
            key: bucket for key, bucket in self._buckets.items() if bucket.level < bucket.per_minute
        }
