"""The accounts of one process, for other processes on this machine that answer callers.

    accounts, figures = Accounts.of(config), GatheredFigures()
    with LedgerServer(accounts, figures) as server:
        start_processes({LEDGER_VARIABLE: server.address})   # each has SharedAccounts, and so an
                                                             # Admission as ever

One thread answers all of them, in the order in which they ask, so that every limit holds for their
sum to the last request. From `LedgerServer(...)` on the accounts are that thread's: the process
itself may close them, when the server is closed, and nothing else.

A process that dies, even by SIGKILL, leaves its requests to the server: they no longer count as
running, their callers are charged what the process has said that they used, and get the rest back.
What it says of a token it says before it sends the token on.

The figures of these processes come the same way, and are added up (serving/observe/gathered.py).

The socket lies in a folder of mode 0700: whoever may open it is the same user, who can do all that
these processes can.
"""

import json
import logging
import selectors
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from serving.accounting.accounts import Accounts
from serving.accounting.ledger_wire import caller_of, error_of, line_of
from serving.accounting.tab import Tab, Used
from serving.errors import ServingError, SetupError
from serving.observe.gathered import GatheredFigures

LEDGER_VARIABLE = "MIXTRAL_JAX_LEDGER"
"""Environment variable with the path of the socket, in processes that share accounts."""
_READ = 2**16
_SEND_SECONDS = 5.0  # after which a process that does not read its answers is given up

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Process:
    """The connection of one process, and the requests that it answers."""

    connection: socket.socket
    received: bytearray = field(default_factory=bytearray)
    tabs: dict[int, Tab] = field(default_factory=dict)
    used: dict[int, Used] = field(default_factory=dict)  # so far, of open tabs
    pid: int | None = None  # known when it has told its figures


class LedgerServer:
    """Shares accounts with other processes, from a thread of its own, until it is closed.

    Args:
        accounts: The accounts.
        figures: Adds up the figures of the processes.

    Attributes:
        address: The path of the socket.

    Raises:
        SetupError: No socket can be made in the folder for temporary files.
    """

    def __init__(self, accounts: Accounts, figures: GatheredFigures | None = None) -> None:
        self._accounts = accounts
        self._figures = figures or GatheredFigures()
        self._folder = Path(tempfile.mkdtemp(prefix="mixtral-jax-"))  # of mode 0700
        self.address = str(self._folder / "ledger")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(self.address)
        except OSError as error:
            self._listener.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise SetupError(
                f"no socket can be made in {self._folder} ({error}); set TMPDIR to another folder, "
                "whose path is short"
            ) from None
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._processes: set[_Process] = set()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Settles what is open, and ends the thread. The accounts stay open."""
        self._wake.close()
        self._thread.join()
        self._selector.close()
        self._listener.close()
        self._woken.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "LedgerServer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        is_open = True
        while is_open:
            for key, _ in self._selector.select():
                answer: Callable[[], None] | None = key.data
                if answer is None:
                    is_open = False
                else:
                    answer()
        for process in tuple(self._processes):
            self._leave(process)

    def _accept(self) -> None:
        with suppress(OSError):  # the process has gone already
            connection, _ = self._listener.accept()
            connection.settimeout(_SEND_SECONDS)
            process = _Process(connection)
            self._processes.add(process)
            self._selector.register(
                connection, selectors.EVENT_READ, lambda: self._receive(process)
            )

    def _receive(self, process: _Process) -> None:
        """Does what a process says; its end is the end of its requests."""
        try:
            received = process.connection.recv(_READ)
            process.received += received
            *lines, rest = process.received.split(b"\n")
            process.received = bytearray(rest)
            for line in lines:
                if (answer := self._answer(process, json.loads(line))) is not None:
                    process.connection.sendall(line_of(*answer))
        except OSError:
            received = b""
        except Exception:  # a fault of ours, for which the others must not pay
            logger.exception("a process has said what the ledger does not understand")
            received = b""
        if not received and process in self._processes:
            self._leave(process)

    def _answer(self, process: _Process, message: list[Any]) -> tuple[Any, ...] | None:
        """Does what one message says; returns the answer, if it has one."""
        try:
            match message:
                case ["note", number, values]:
                    process.used[number] = Used(*values)
                case ["settle", number, values]:
                    process.used.pop(number, None)
                    process.tabs.pop(number).settle(None if values is None else Used(*values))
                case [("begin" | "open") as kind, number, name, limits]:
                    process.tabs[number] = self._accounts.open(caller_of(name, limits))
                    return () if kind == "open" else None
                case ["enter", number, count, running]:
                    process.tabs[number].enter(count, running)
                    return ()
                case ["take", number, tokens]:
                    process.tabs[number].take(tokens)
                    return ()
                case ["correct", number, tokens]:
                    process.tabs[number].correct(tokens)
                case ["allowances", name, limits]:
                    allowances = self._accounts.allowances(caller_of(name, limits))
                    return ({unit: asdict(allowance) for unit, allowance in allowances.items()},)
                case ["figures", pid, text]:
                    process.pid = pid
                    self._figures.put(pid, text)
                case ["sums", pid, text]:
                    self._figures.put(pid, text)
                    self._answer_slowly(process, lambda: self._figures.text().decode())
                case ["report", name]:
                    report = partial(self._accounts.read_report, name)
                    self._answer_slowly(process, lambda: [astuple(row) for row in report()])
                case _:
                    raise ValueError(f"no message of ours: {str(message)[:200]}")
        except ServingError as error:
            return (error_of(error),)
        return None

    def _answer_slowly(self, process: _Process, read: Callable[[], object]) -> None:
        """Answers in a thread, for which the others need not wait, and closes the connection."""
        self._selector.unregister(process.connection)
        self._processes.discard(process)

        def answer() -> None:
            with process.connection as connection, suppress(OSError):
                try:
                    connection.sendall(line_of(read()))
                except ServingError as error:
                    connection.sendall(line_of(error_of(error)))

        threading.Thread(target=answer, name="report", daemon=True).start()

    def _leave(self, process: _Process) -> None:
        """Settles the requests of a process that has ended, as far as it has answered them."""
        self._selector.unregister(process.connection)
        self._processes.discard(process)
        process.connection.close()
        for number, tab in process.tabs.items():
            tab.settle(process.used.get(number))
        if process.pid is not None:
            self._figures.end(process.pid)
