"""The accounts of callers: their limits, and what they have used."""

import asyncio

from serving.accounting.ledger import Usage, UsageLedger
from serving.accounting.rate_limits import RateLimits


class Accounts:
    """Holds an account for each caller, by name.

    Args:
        rates: The limits of each caller; by default there are none.
        ledger: The record of what callers have used; by default in memory.
    """

    def __init__(self, rates: RateLimits | None = None, ledger: UsageLedger | None = None) -> None:
        self._rates = rates or RateLimits()
        self._ledger = ledger or UsageLedger()

    def take_request(self, caller: str) -> None:
        """Takes a request from the caller's minute; raises Overloaded, with its `retry_after`."""
        self._rates.take_request(caller)

    def charge(self, caller: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Takes an answered request's tokens from the caller's minute, and writes it down."""
        self._rates.take_tokens(caller, prompt_tokens + completion_tokens)
        self._ledger.add(caller, prompt_tokens, completion_tokens)

    async def report(self, caller: str | None) -> list[Usage]:
        """Returns what a caller has used, or all of them if None, by caller and day."""
        return await asyncio.to_thread(self._ledger.report, caller)

    def close(self) -> None:
        """Writes what the ledger has not written yet."""
        self._ledger.close()
