"""Limits of what each caller may ask: requests and tokens in a minute, and requests at a time.

A caller has two token buckets, one for requests and one for tokens of prompts and answers. Each
holds a minute's worth and fills up evenly. Tokens are taken before they are computed, as many as a
request may need, and those that it did not need are given back when it is over. A caller whose
prompt was longer than estimated can be in debt by the difference, and waits until it is not.

The limits hold for one server, whose processes share them (ledger_server.py). Several gateways of
one deployment have a share of them each.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from serving.access.caller import Caller, CallerLimits
from serving.errors import InvalidRequest, Overloaded

# Above this number of buckets, those that are full again are forgotten.
_MAX_BUCKETS = 20_000
_FORGET_SECONDS = 1.0
UNITS = ("requests", "tokens")


@dataclass(frozen=True)
class Allowance:
    """The state of a limit, as the headers `x-ratelimit-*` tell it."""

    limit: int
    remaining: int
    reset: float
    """Seconds until all of the limit remains."""


@dataclass
class _Bucket:
    """A token bucket that holds at most one minute's worth."""

    per_minute: float
    level: float
    at: float  # the clock when that was the level

    @property
    def capacity(self) -> float:
        return max(1.0, self.per_minute)  # a share of a small limit is less than one request

    def fill(self, now: float, per_minute: float) -> None:
        """Adds what has come since the last call; the limit may have changed."""
        gained = (now - self.at) * self.per_minute / 60
        self.per_minute = per_minute
        self.level = min(self.capacity, self.level + gained)
        self.at = now

    def wait(self, level: float) -> float:
        """Returns the seconds until the bucket holds `level`, counted from the last `fill`."""
        # The tolerance is for rounding errors, which must not make anybody wait.
        return max(0.0, (level - 1e-9 - self.level) * 60 / self.per_minute)


class RateLimits:
    """Holds callers to limits. For use in one thread.

    Args:
        limits: The limits of every caller for which its own key does not say otherwise.
        share: The part of all limits that this process enforces.
        clock: Returns seconds, like time.monotonic.
    """

    def __init__(
        self,
        limits: CallerLimits = CallerLimits(),
        share: Fraction = Fraction(1),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._share = share
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}  # (caller, "requests" or "tokens")
        self._forgot_at = -math.inf  # the clock when all buckets were looked through
        self._running: dict[str, int] = {}  # requests by caller

    def enter(
        self, caller: Caller, count: int = 1, *, taken: int = 0, running: int | None = None
    ) -> None:
        """Takes requests that begin now, which `leave` must end; or raises, and takes nothing.

        Args:
            caller: The caller.
            count: The number of requests to take.
            taken: The number that was taken before for the same HTTP request.
            running: The number of them that run at a time, which `leave` is told; None for all.

        Raises:
            InvalidRequest: They are more than the caller may ever have.
            Overloaded: They are too many now, or the caller has no tokens.
        """
        running = count if running is None else running
        self._check_running(caller, count + taken, running, running + taken)
        self._check(caller, "requests", count, taken)
        self._check(caller, "tokens", 1)  # how many it needs is not known yet
        requests = self._bucket(caller, "requests")
        if requests:
            requests.level -= count
        self._running[caller.name] = self._running.get(caller.name, 0) + running

    def leave(self, caller: Caller, count: int) -> None:
        """Ends requests that have been taken by `enter`."""
        running = self._running[caller.name] - count
        assert running >= 0
        if running:
            self._running[caller.name] = running
        else:
            del self._running[caller.name]

    def take_tokens(self, caller: Caller, tokens: int) -> None:
        """Takes tokens before they are computed; or raises as `enter` does, and takes nothing."""
        self._check(caller, "tokens", tokens)
        self.give_tokens(caller, -tokens)

    def give_tokens(self, caller: Caller, tokens: float) -> None:
        """Gives tokens back that were not needed, or takes more where the number is negative."""
        bucket = self._bucket(caller, "tokens")
        if bucket:
            bucket.level += tokens

    def tokens_of_a_minute(self, caller: Caller) -> int | None:
        """Returns the tokens that a request can have at most; None without a limit."""
        per_minute = self._per_minute(caller, "tokens")
        return None if per_minute is None else int(max(1.0, per_minute))

    def has_limits(self, caller: Caller) -> bool:
        """Returns whether anything of this caller is limited."""
        minutes = any(self._per_minute(caller, unit) is not None for unit in UNITS)
        return minutes or self.requests_at_a_time(caller) is not None

    def requests_at_a_time(self, caller: Caller) -> int | None:
        """Returns the number of requests that may run at a time; None without a limit."""
        limit = caller.limits.concurrent_requests or self._limits.concurrent_requests
        return None if limit is None else max(1, math.floor(limit * self._share))

    def allowances(self, caller: Caller) -> dict[str, Allowance]:
        """Returns the state of the caller's limits of requests and tokens, where there are any."""
        return {
            unit: Allowance(
                limit=int(bucket.capacity),
                remaining=max(0, math.floor(bucket.level + 1e-9)),
                reset=round(bucket.wait(bucket.capacity), 3),
            )
            for unit in UNITS
            if (bucket := self._bucket(caller, unit)) is not None
        }

    def _check_running(self, caller: Caller, prompts: int, count: int, of_request: int) -> None:
        """Raises unless `count` more may run; `of_request` are all that run of the request."""
        limit = self.requests_at_a_time(caller)
        if limit is None:
            return
        if of_request > limit:
            raise InvalidRequest(
                f"the request has {prompts} prompts, and this key may have {limit} requests at a "
                "time; send fewer prompts"
            )
        if self._running.get(caller.name, 0) + count > limit:
            raise Overloaded(
                f"this key may have {limit} requests at a time; try again when one has ended"
            )

    def _check(self, caller: Caller, unit: str, number: int, taken: int = 0) -> None:
        """Raises unless the caller's bucket holds the number beside those that were `taken`."""
        bucket = self._bucket(caller, unit)
        if bucket is None:
            return
        may = f"this key may use {bucket.per_minute:g} {unit} a minute"
        if (whole := number + taken) > bucket.capacity:
            remedy = (
                "lower max_tokens or n, or shorten the prompt"
                if unit == "tokens"
                else "send fewer prompts"
            )
            raise InvalidRequest(f"the request may use {whole:,} {unit}, and {may}; {remedy}")
        if wait := bucket.wait(number):
            seconds = math.ceil(wait)
            raise Overloaded(f"{may}; try again in {seconds} seconds", retry_after=wait)

    def _per_minute(self, caller: Caller, unit: str) -> float | None:
        name = f"{unit}_per_minute"
        limit: int | None = getattr(caller.limits, name) or getattr(self._limits, name)
        return None if limit is None else float(limit * self._share)

    def _bucket(self, caller: Caller, unit: str) -> _Bucket | None:
        """Returns the caller's bucket of "requests" or "tokens", filled; None without a limit."""
        per_minute = self._per_minute(caller, unit)
        if per_minute is None:
            return None
        now = self._clock()
        bucket = self._buckets.get((caller.name, unit))
        if bucket is None:
            self._forget(now)
            bucket = _Bucket(per_minute, max(1.0, per_minute), now)
            self._buckets[caller.name, unit] = bucket
        bucket.fill(now, per_minute)
        return bucket

    def _forget(self, now: float) -> None:
        """Drops the full buckets, which are the same as none, when there are very many.

        It looks through them once a second at most: that takes milliseconds of the event loop.
        """
        if len(self._buckets) < _MAX_BUCKETS or now - self._forgot_at < _FORGET_SECONDS:
            return
        self._forgot_at = now
        for bucket in self._buckets.values():
            bucket.fill(now, bucket.per_minute)
        self._buckets = {
            key: bucket for key, bucket in self._buckets.items() if bucket.level < bucket.capacity
        }
