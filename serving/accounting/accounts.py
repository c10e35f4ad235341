"""The accounts of callers: their limits, and what they have used.

Where several processes answer callers, one of them has the accounts (ledger_server.py), and the
others use them from there (ledger_client.py).
"""

import asyncio

from serving.access.caller import Caller
from serving.accounting.config import AccountingConfig
from serving.accounting.ledger import Usage, UsageLedger
from serving.accounting.rate_limits import Allowance, RateLimits
from serving.accounting.tab import OwnTab, Tab


class Accounts:
    """Holds an account for each caller, by name.

    Args:
        rates: The limits of each caller; by default there are none.
        ledger: The record of what callers have used; without it that is not kept.
    """

    def __init__(self, rates: RateLimits | None = None, ledger: UsageLedger | None = None) -> None:
        self.rates = rates or RateLimits()
        self._ledger = ledger
        # Reports read the disk one at a time: many at once would hold every thread of the loop.
        self._reporting = asyncio.Lock()

    @classmethod
    def of(cls, config: AccountingConfig) -> "Accounts":
        """Returns the accounts that the operator's settings ask for. Raises SetupError."""
        return cls(RateLimits(config.limits, config.share), UsageLedger(config.usage_db))

    def open(self, caller: Caller) -> Tab:
        """Admits a request, and returns its tab; raises Overloaded, with its own `retry_after`."""
        return OwnTab(self.rates, self.add, caller)

    def add(
        self,
        caller: str,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int = 0,
        adapter: str = "",
    ) -> None:
        """Writes down an answered request and its tokens; `adapter` is what has answered."""
        if self._ledger is not None:
            self._ledger.add(caller, prompt_tokens, completion_tokens, cached_tokens, adapter)

    def allowances(self, caller: Caller) -> dict[str, Allowance]:
        """Returns the state of a caller's limits by unit, where there are any."""
        return self.rates.allowances(caller)

    async def report(self, caller: str | None) -> list[Usage]:
        """Returns what a caller has used, or all of them if None, by caller and day.

        Raises Unavailable if it cannot be read now.
        """
        async with self._reporting:
            return await asyncio.to_thread(self.read_report, caller)

    def read_report(self, caller: str | None) -> list[Usage]:
        """Returns what `report` does, and waits for the disk meanwhile."""
        return [] if self._ledger is None else self._ledger.report(caller)

    def flush(self) -> None:
        """Tells what was noted of open tabs, where another process has the accounts."""

    def close(self) -> None:
        """Writes what the ledger has not written yet."""
        if self._ledger is not None:
            self._ledger.close()
