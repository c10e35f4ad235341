"""Accounts: their reports take one thread, however many are asked for."""

import asyncio
import threading

import pytest

from serving.accounting.accounts import Accounts
from serving.accounting.ledger import Usage, UsageLedger


def test_reports_wait_for_one_another_outside_of_the_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """40 callers ask while the disk stands still, and other work still finds a thread."""
    ledger = UsageLedger()
    accounts = Accounts(ledger=ledger)
    may_go_on = threading.Event()

    def report(caller: str | None) -> list[Usage]:
        assert may_go_on.wait(20)
        return []

    monkeypatch.setattr(ledger, "report", report)

    async def work() -> None:
        reports = [asyncio.create_task(accounts.report("a")) for _ in range(40)]
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.to_thread(may_go_on.set), 10)
        assert await asyncio.gather(*reports) == [[]] * 40

    asyncio.run(work())
    accounts.close()
