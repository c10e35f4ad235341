"""Several gateway processes behind one port: the parent, which answers no request itself.

It listens, has the ledger of all callers and adds up the figures; the processes accept connections
at its socket. One that dies is started again (serving/child.py), and so is one that stands still;
the others go on. Its clients' connections break, and the ledger settles what it has answered. When
one is told to end, or the parent is, all of them drain and end.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from types import FrameType

from serving.accounting.ledger_server import LEDGER_VARIABLE
from serving.child import Child
from serving.parent import PARENT_VARIABLE

LISTENER_VARIABLE = "MIXTRAL_JAX_LISTENER_FD"
"""Environment variable with the file descriptor of the socket at which a process accepts."""
_STANDSTILL_SECONDS = 60.0
_LOOK_SECONDS = 0.1
_STOP_SECONDS = 8.0  # time that a process may take to end after its drain


def run_processes(
    number: int, options: Sequence[str], listener: socket.socket, ledger: str, end_seconds: float
) -> None:
    """Keeps so many processes running until SIGTERM or SIGINT, or until one was told to end.

    Args:
        number: The number of processes.
        options: Their command line, the same for all.
        listener: The socket at which they accept connections.
        ledger: The path of the ledger's socket.
        end_seconds: The time that they may take to end, with their drain.

    Raises:
        SupervisorError: One has failed for good.
    """
    environment = {
        **os.environ,
        PARENT_VARIABLE: str(os.getpid()),
        LEDGER_VARIABLE: ledger,
        LISTENER_VARIABLE: str(listener.fileno()),
    }
    children = [
        Child(
            f"gateway process {place + 1}",
            ["serving.gateway", *options],
            environment,
            (listener.fileno(),),
            beat_seconds=_STANDSTILL_SECONDS,
        )
        for place in range(number)
    ]
    with _Signals() as signals:
        try:
            while not signals.number and not any(child.was_told_to_end for child in children):
                for child in children:
                    child.keep_running()
                    if child.has_beaten:
                        child.note_serving()
                time.sleep(_LOOK_SECONDS)
        finally:
            running = [child.process for child in children if child.process is not None]
            _end(running, signals, end_seconds + _STOP_SECONDS)
            for child in children:
                child.close()


class _Signals:
    """Counts SIGTERM and SIGINT instead of being interrupted."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> "_Signals":
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number += 1


def _end(processes: Sequence["subprocess.Popen[bytes]"], signals: _Signals, seconds: float) -> None:
    """Has processes drain; kills those that have not ended in time, or at another signal."""
    deadline, before = time.monotonic() + seconds, signals.number
    for process in processes:
        process.terminate()
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline or signals.number > max(before, 1):
            for process in processes:
                process.kill()
        time.sleep(_LOOK_SECONDS)
