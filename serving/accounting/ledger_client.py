"""The accounts of another process, as those that share them use them (ledger_server.py).

    accounts = SharedAccounts.of(config, os.environ[LEDGER_VARIABLE])
    admission = Admission(accounts, config.assumed_max_tokens, config.cached_token_charge)

Callers without limits, and all that ends or goes on, cost a message that nobody waits for. A limit
costs a round trip of about 0.1 ms, for which the event loop waits: a task that waited instead would
cost it as much. When the other process is gone, everybody is refused (Unavailable), because nobody
knows any more what a caller may have.
"""

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

from serving.access.caller import Caller
from serving.accounting.accounts import Accounts
from serving.accounting.config import AccountingConfig
from serving.accounting.ledger import Usage
from serving.accounting.ledger_wire import line_of, read_answer, values_of_caller
from serving.accounting.rate_limits import Allowance, RateLimits
from serving.accounting.tab import Tab, Used
from serving.errors import SetupError, Unavailable

_SECONDS = 2.0  # for an answer of the other process, which needs a ten-thousandth of it
_APART_SECONDS = 30.0

logger = logging.getLogger(__name__)


class SharedAccounts(Accounts):
    """Accounts that another process holds. For use in one event loop.

    Attributes:
        was_lost: Whether the other process is gone, and everybody is refused.

    Args:
        address: The path of the other process's socket.
        rates: The limits of callers, which the other process has too; here they only say who has
            any, and how high they are.

    Raises:
        SetupError: The other process does not listen there.
    """

    def __init__(self, address: str, rates: RateLimits) -> None:
        super().__init__(rates)
        self._address = address
        self._numbers = itertools.count()
        self._notes: dict[int, Callable[[], Used]] = {}
        self._received = b""
        self.was_lost = False
        self._connection: socket.socket | None
        try:
            self._connection = _connected(address, _SECONDS)
        except OSError as error:
            raise SetupError(f"the ledger cannot be reached at {address}: {error}") from None

    @classmethod
    def of(cls, config: AccountingConfig, address: str = "") -> "SharedAccounts":
        """Returns the accounts at an address; the operator's settings are the other process's."""
        return cls(address, RateLimits(config.limits, config.share))

    def open(self, caller: Caller) -> Tab:
        """Admits a request; raises Overloaded, or Unavailable when the other process is gone."""
        tab = _SharedTab(self, next(self._numbers), has_limits=self.rates.has_limits(caller))
        name, limits = values_of_caller(caller)
        if tab.has_limits:
            self.ask("open", tab.number, name, limits)
        else:
            self.tell("begin", tab.number, name, limits)
            if self.was_lost:
                raise _gone()
        return tab

    def allowances(self, caller: Caller) -> dict[str, Allowance]:
        """Returns the state of a caller's limits; none when the other process is gone."""
        if not self.rates.has_limits(caller) or self.was_lost:
            return {}
        try:
            (units,) = self.ask("allowances", *values_of_caller(caller))
        except Unavailable:
            return {}
        return {unit: Allowance(**values) for unit, values in units.items()}

    def read_report(self, caller: str | None) -> list[Usage]:
        """Returns what a caller or everybody has used; raises Unavailable. For any thread."""
        return [Usage(*row) for row in self._ask_apart("report", caller)]

    def tell_figures(self, text: bytes) -> None:
        """Tells the figures of this process, in Prometheus' text format."""
        self.tell("figures", os.getpid(), text.decode())

    def sums(self, text: bytes) -> bytes:
        """Returns the figures of all processes; raises Unavailable. For any thread.

        Args:
            text: Those of this one.
        """
        sums: str = self._ask_apart("sums", os.getpid(), text.decode())
        return sums.encode()

    def _ask_apart(self, *message: object) -> Any:
        """Returns the answer to a message that takes longer, over a connection of its own."""
        try:
            with _connected(self._address, _APART_SECONDS) as connection:
                connection.sendall(line_of(*message))
                with connection.makefile("rb") as answer:
                    (value,) = read_answer(answer.readline())
        except (OSError, ValueError) as error:
            raise _gone() from error
        return value

    def close(self) -> None:
        """Tells what is noted, and ends the connection."""
        self.flush()
        self._lose(None)

    def ask(self, *message: object) -> list[Any]:
        """Returns the answer to a message; raises the error that it is, or Unavailable."""
        self.tell(*message)
        try:
            while b"\n" not in self._received:
                if self._connection is None:
                    raise _gone()
                received = self._connection.recv(2**16)
                if not received:
                    raise ConnectionError("the ledger's process has ended")
                self._received += received
        except OSError as error:
            self._lose(error)
            raise _gone() from error
        line, _, self._received = self._received.partition(b"\n")
        return read_answer(line)

    def tell(self, *message: object) -> None:
        """Sends a message that has no answer; it is lost when the other process is gone."""
        self._send(line_of(*message))

    def note(self, number: int, used: Callable[[], Used]) -> None:
        """Tells, once in a pass of the event loop, what requests have used so far."""
        if not self._notes:
            asyncio.get_running_loop().call_soon(self.flush)
        self._notes[number] = used

    def forget(self, number: int) -> None:
        """Drops what is still to be told of a request, because it ends."""
        self._notes.pop(number, None)

    def flush(self) -> None:
        """Tells what is noted."""
        if self._notes:
            notes, self._notes = self._notes, {}
            self._send(
                b"".join(line_of("note", number, astuple(used())) for number, used in notes.items())
            )

    def _send(self, lines: bytes) -> None:
        if self._connection is not None:
            try:
                self._connection.sendall(lines)
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError | None) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            if error is not None:
                self.was_lost = True
                logger.error("the ledger is lost, and nobody is let in any more: %s", error)


class _SharedTab:
    """A tab in the accounts of another process."""

    def __init__(self, accounts: SharedAccounts, number: int, *, has_limits: bool) -> None:
        self.number = number
        self.has_limits = has_limits
        self._accounts = accounts
        self._is_settled = False

    def enter(self, count: int, running: int) -> None:
        """Takes more requests, as `Tab` says."""
        if self.has_limits:
            self._accounts.ask("enter", self.number, count, running)

    def take(self, tokens: int) -> None:
        """Takes tokens, as `Tab` says."""
        if self.has_limits:
            self._accounts.ask("take", self.number, tokens)

    def correct(self, tokens: int) -> None:
        """Takes more tokens or gives some back, as `Tab` says."""
        if self.has_limits and not self._is_settled:
            self._accounts.tell("correct", self.number, tokens)

    def note(self, used: Callable[[], Used]) -> None:
        """Tells what has been used so far, as `NotedTab` says."""
        if not self._is_settled:
            self._accounts.note(self.number, used)

    def settle(self, used: Used | None) -> None:
        """Ends it, as `Tab` says."""
        if not self._is_settled:
            self._is_settled = True
            self._accounts.forget(self.number)
            self._accounts.tell("settle", self.number, None if used is None else astuple(used))


def _connected(address: str, seconds: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(seconds)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def _gone() -> Unavailable:
    return Unavailable("the server's ledger is gone, and it starts again; try again shortly")
