"""Limits by a clock of our own: every wait can be worked out by hand."""

from fractions import Fraction

import pytest

from serving.access.caller import Caller, CallerLimits
from serving.accounting import rate_limits
from serving.accounting.rate_limits import Allowance, RateLimits
from serving.errors import InvalidRequest, Overloaded
from tests.support.clock import Clock

ME, YOU = Caller("me"), Caller("you")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def limited(
    clock: Clock,
    requests: int | None = None,
    tokens: int | None = None,
    running: int | None = None,
    share: str = "1",
) -> RateLimits:
    return RateLimits(CallerLimits(requests, tokens, running), Fraction(share), clock)


def wait(rates: RateLimits, caller: Caller = ME) -> int:
    """The seconds that a refused caller is told to wait."""
    with pytest.raises(Overloaded) as refusal:
        rates.enter(caller)
    assert isinstance(refusal.value.retry_after, int)
    return refusal.value.retry_after


def test_without_limits_everybody_passes(clock: Clock) -> None:
    rates = limited(clock)
    for _ in range(1000):
        rates.enter(ME)
        rates.take_tokens(ME, 10**9)
    assert rates.allowances(ME) == {}


def test_requests_a_minute(clock: Clock) -> None:
    rates = limited(clock, requests=4)  # one comes back every 15 seconds
    for _ in range(4):
        rates.enter(ME)
    assert wait(rates) == 15
    rates.enter(YOU)
    clock.now += 4.5
    assert wait(rates) == 11  # 10.5
    clock.now += 10.5
    rates.enter(ME)
    assert wait(rates) == 15
    clock.now += 3600
    for _ in range(4):  # no more than a minute's worth is saved up
        rates.enter(ME)
    assert wait(rates) == 15


def test_who_waits_as_long_as_told_is_admitted(clock: Clock) -> None:
    for limit in (1, 3, 7, 11, 59, 60, 61, 1000):
        rates = limited(clock, requests=limit)
        for _ in range(limit):
            rates.enter(ME)
        for _ in range(50):
            clock.now += wait(rates)
            rates.enter(ME)
            while True:
                try:
                    rates.enter(ME)
                except Overloaded:
                    break


def test_tokens_are_taken_before_and_given_back_after(clock: Clock) -> None:
    rates = limited(clock, tokens=600)  # ten come back every second
    rates.take_tokens(ME, 590)
    with pytest.raises(Overloaded, match="600 tokens a minute; try again in 1 seconds") as refusal:
        rates.take_tokens(ME, 15)
    assert refusal.value.retry_after_ms == 500  # five are missing
    rates.take_tokens(YOU, 600)
    rates.give_tokens(ME, 90)
    rates.take_tokens(ME, 100)
    rates.give_tokens(ME, -190)  # the prompt was longer than estimated
    assert wait(rates) == 20  # until a token is there: 191 / 10
    clock.now += 19.0
    assert wait(rates) == 1
    clock.now += 0.1
    rates.enter(ME)
    rates.give_tokens(ME, 10**6)
    assert rates.allowances(ME)["tokens"].remaining == 600


def test_what_can_never_be_is_no_matter_of_waiting(clock: Clock) -> None:
    rates = limited(clock, requests=2, tokens=50, running=2)
    with pytest.raises(InvalidRequest, match="may use 51 tokens, .* 50 tokens .* lower max_tokens"):
        rates.take_tokens(ME, 51)
    with pytest.raises(InvalidRequest, match="3 prompts, and this key may have 2 requests at"):
        rates.enter(ME, 3)
    rates = limited(clock, requests=2)
    with pytest.raises(InvalidRequest, match="3 requests, .* 2 requests a minute; send fewer"):
        rates.enter(ME, 3)
    rates.enter(ME, 2)


def test_prompts_that_were_taken_before_count(clock: Clock) -> None:
    """The first prompt of a request is taken before its others are known."""
    rates = limited(clock, running=3)
    rates.enter(ME)
    with pytest.raises(InvalidRequest, match="4 prompts, and this key may have 3 requests at"):
        rates.enter(ME, 3, taken=1)
    rates.enter(ME, 2, taken=1)
    rates = limited(clock, requests=3)
    rates.enter(ME)
    with pytest.raises(InvalidRequest, match="4 requests, .* 3 requests a minute"):
        rates.enter(ME, 3, taken=1)
    rates.enter(ME, 2, taken=1)


def test_a_process_alone_enforces_all_of_a_limit(clock: Clock) -> None:
    rates = RateLimits(CallerLimits(requests_per_minute=4, concurrent_requests=4), clock=clock)
    for _ in range(4):
        rates.enter(ME)
    assert rates.allowances(ME)["requests"] == Allowance(limit=4, remaining=0, reset=60.0)


def test_a_share_leaves_one_request_at_a_time(clock: Clock) -> None:
    rates = limited(clock, running=2, share="1/3")
    rates.enter(ME)
    with pytest.raises(Overloaded, match="may have 1 requests at a time"):
        rates.enter(ME)


def test_requests_at_a_time(clock: Clock) -> None:
    rates = limited(clock, requests=100, running=2)
    rates.enter(ME)
    rates.enter(ME)
    with pytest.raises(Overloaded, match="2 requests at a time; try again when one has ended"):
        rates.enter(ME)
    assert rates.allowances(ME)["requests"].remaining == 98  # the refusal took nothing
    rates.enter(YOU)
    rates.leave(ME, 1)
    with pytest.raises(Overloaded):
        rates.enter(ME, 2)
    rates.enter(ME)
    rates.leave(ME, 2)
    assert rates._running == {"you": 1}


def test_a_refusal_takes_nothing(clock: Clock) -> None:
    rates = limited(clock, requests=2, tokens=60)
    rates.enter(ME)
    rates.give_tokens(ME, -(60 + 89))
    assert wait(rates) == 90  # for a token
    clock.now += 89
    assert wait(rates) == 1
    clock.now += 1
    rates.enter(ME)  # the refusals did not take a request
    rates.enter(ME)
    assert wait(rates) == 30


def test_a_key_of_its_own_limits(clock: Clock) -> None:
    rates = limited(clock, requests=1, tokens=10, running=1)
    rich = Caller("rich", limits=CallerLimits(requests_per_minute=3, concurrent_requests=2))
    rates.enter(rich)
    rates.enter(rich)
    with pytest.raises(Overloaded, match="2 requests at a time"):
        rates.enter(rich)
    assert rates.allowances(rich) == {
        "requests": Allowance(limit=3, remaining=1, reset=40.0),
        "tokens": Allowance(limit=10, remaining=10, reset=0.0),
    }
    # The operator changes the limit of the key while it is used.
    poor = Caller("rich", limits=CallerLimits(requests_per_minute=1))
    assert rates.allowances(poor)["requests"] == Allowance(limit=1, remaining=1, reset=0.0)


def test_a_share_of_the_limits(clock: Clock) -> None:
    rates = limited(clock, requests=6, tokens=300, running=7, share="1/3")
    assert rates.tokens_of_a_minute(ME) == 100
    rates.enter(ME, 2)
    with pytest.raises(Overloaded, match="2 requests at a time"):  # a third of 7
        rates.enter(ME)
    rates.leave(ME, 2)
    assert wait(rates) == 30  # two a minute
    with pytest.raises(InvalidRequest, match="100 tokens a minute"):
        rates.take_tokens(ME, 101)
    small = limited(clock, requests=2, running=2, share="1/3")  # two thirds of a request a minute
    small.enter(ME)
    small.leave(ME, 1)
    assert wait(small) == 90


def test_callers_of_the_past_are_forgotten(clock: Clock) -> None:
    rates = limited(clock, requests=1)
    for number in range(20_000):
        rates.enter(Caller(f"caller {number}"))
    rates.enter(Caller("one more"))  # everybody's bucket is empty: nobody is forgotten
    clock.now += 60
    rates.enter(Caller("and another"))
    assert len(rates._buckets) == 1
    assert wait(rates, Caller("and another")) == 60


def test_all_buckets_are_looked_through_once_a_second(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """With 4 buckets and more there is a look at each that comes; here at 0, 1 and 62 seconds."""
    monkeypatch.setattr(rate_limits, "_MAX_BUCKETS", 4)
    rates = limited(clock, requests=1)
    looks = []
    for number, seconds in enumerate((0, 0, 0, 0, 0, 0.9, 0.1, 0.5, 60.5)):
        clock.now += seconds
        before = rates._forgot_at
        rates.enter(Caller(f"caller {number}"))
        if rates._forgot_at != before:
            looks.append(number)
    assert looks == [4, 6, 8]
    assert list(rates._buckets) == [("caller 8", "requests")]
