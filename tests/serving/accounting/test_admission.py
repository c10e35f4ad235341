"""Admission: a lease is charged once its tokens are known, and a refused request costs nothing."""

import asyncio

import pytest

from serving.accounting.accounts import Accounts
from serving.accounting.admission import Admission
from serving.accounting.rate_limits import RateLimits
from serving.errors import Overloaded


def test_a_lease_is_charged_when_it_is_settled() -> None:
    accounts = Accounts(RateLimits(requests_per_minute=2, clock=lambda: 1000.0))
    admission = Admission(accounts)
    admission.admit("me")  # its answer fails: it is never settled
    lease = admission.admit("me")
    assert asyncio.run(accounts.report("me")) == []
    lease.settle(3, 4)
    with pytest.raises(Overloaded, match="2 requests a minute"):
        admission.admit("me")
    admission.admit("you")
    (usage,) = asyncio.run(accounts.report(None))
    assert (usage.caller, usage.requests) == ("me", 1)
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 4)
    accounts.close()


def test_settled_tokens_count_against_the_minute() -> None:
    accounts = Accounts(RateLimits(tokens_per_minute=60, clock=lambda: 1000.0))
    admission = Admission(accounts)
    admission.admit("me").settle(30, 40)  # a debt of 10, which takes 10 seconds
    with pytest.raises(Overloaded) as refusal:
        admission.admit("me")
    assert refusal.value.retry_after == 10
    accounts.close()
