"""Buckets by a clock of our own: every wait can be worked out by hand."""

import pytest

from serving.accounting.rate_limits import RateLimits
from serving.errors import Overloaded


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def wait(rates: RateLimits, caller: str = "me") -> int:
    """The seconds that a refused caller is told to wait."""
    with pytest.raises(Overloaded) as refusal:
        rates.take_request(caller)
    assert isinstance(refusal.value.retry_after, int)
    return refusal.value.retry_after


def test_without_limits_everybody_passes(clock: Clock) -> None:
    rates = RateLimits(clock=clock)
    for _ in range(1000):
        rates.take_request("me")
        rates.take_tokens("me", 10**9)


def test_requests_a_minute(clock: Clock) -> None:
    rates = RateLimits(requests_per_minute=4, clock=clock)  # one comes back every 15 seconds
    for _ in range(4):
        rates.take_request("me")
    assert wait(rates) == 15
    rates.take_request("you")
    clock.now += 4.5
    assert wait(rates) == 11  # 10.5
    clock.now += 10.5
    rates.take_request("me")
    assert wait(rates) == 15
    clock.now += 3600
    for _ in range(4):  # no more than a minute's worth is saved up
        rates.take_request("me")
    assert wait(rates) == 15


def test_who_waits_as_long_as_told_is_admitted(clock: Clock) -> None:
    for limit in (1, 3, 7, 11, 59, 60, 61, 1000):
        rates = RateLimits(requests_per_minute=limit, clock=clock)
        for _ in range(limit):
            rates.take_request("me")
        for _ in range(50):
            clock.now += wait(rates)
            rates.take_request("me")
            while True:
                try:
                    rates.take_request("me")
                except Overloaded:
                    break


def test_tokens_a_minute_and_debt(clock: Clock) -> None:
    rates = RateLimits(tokens_per_minute=600, clock=clock)  # ten come back every second
    rates.take_request("me")
    rates.take_tokens("me", 590)
    rates.take_request("me")  # ten are left, and nobody knows how many this one takes
    rates.take_tokens("me", 200)
    assert wait(rates) == 19  # 190 too many
    with pytest.raises(Overloaded, match="600 tokens a minute; try again in 19 seconds"):
        rates.take_request("me")
    clock.now += 18.9
    assert wait(rates) == 1
    clock.now += 0.1
    rates.take_request("me")


def test_the_longer_wait_counts_and_a_refusal_takes_nothing(clock: Clock) -> None:
    rates = RateLimits(requests_per_minute=1, tokens_per_minute=60, clock=clock)
    rates.take_request("me")
    rates.take_tokens("me", 60 + 90)
    assert wait(rates) == 90  # for tokens; 60 for the request
    clock.now += 89
    assert wait(rates) == 1
    clock.now += 1
    rates.take_request("me")  # the two refusals did not take the request


def test_callers_of_the_past_are_forgotten(clock: Clock) -> None:
    rates = RateLimits(requests_per_minute=1, clock=clock)
    for number in range(10_000):
        rates.take_request(f"caller {number}")
    rates.take_request("one more")  # everybody's bucket is empty: nobody is forgotten
    clock.now += 60
    rates.take_request("and another")
    assert len(rates._buckets) == 1
    assert wait(rates, "and another") == 60
