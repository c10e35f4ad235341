"""The accounts of callers: what they may still ask, and what they have used."""

import asyncio

from serving.accounting.ledger import Usage, UsageLedger
from serving.accounting.rate_limits import Rates


class Accounts:
    """One for each caller, by name.

    Args:
        rates: What they may ask; by default as much as they like.
        ledger: Where what they used is kept; by default in memory.
    """

    def __init__(self, rates: Rates | None = None, ledger: UsageLedger | None = None) -> None:
        self._rates = rates or Rates()
        self._ledger = ledger or UsageLedger()

    def admit(self, caller: str) -> None:
        """Lets a request pass; raises Overloaded, with its own `retry_after`."""
        self._rates.admit(caller)

    def charge(self, caller: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Takes what one answered request cost."""
        self._rates.charge(caller, prompt_tokens + completion_tokens)
        self._ledger.add(caller, prompt_tokens, completion_tokens)

    async def report(self, caller: str | None) -> list[Usage]:
        """What one caller has used, or all of them, by day."""
        return await asyncio.to_thread(self._ledger.report, caller)

    def close(self) -> None:
        """Writes what is not written yet."""
        self._ledger.close()
