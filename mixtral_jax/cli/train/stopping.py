"""Stopping: Ctrl-C, SIGTERM and SIGHUP end a run after the step that runs, or at once.

A step may take minutes in which Python's own handlers do not run, so signals are read by a thread.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopping:
    """Ends this process when a signal comes, unless a run is there that can end by itself.

    A context manager, which must be entered in the main thread. Signals that the process ignores
    (nohup) stay ignored.

    Args:
        tell: shows a line to the user.
        where: says where the run can go on, as a line.

    Attributes:
        number: the signal that came first; None if none came.
    """

    def __init__(self, tell: Callable[[str], None], where: Callable[[], str]) -> None:
        self.number: int | None = None
        self._tell, self._where = tell, where
        self._finish: Callable[[], None] | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stopping":
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, _pass_over)
        self._descriptor = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=(reading,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._descriptor)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.close(self._writing)
        self._thread.join()

    @property
    def status(self) -> int:
        """Exit status of a process that the signal has ended."""
        assert self.number is not None, "no signal came"
        return 128 + self.number

    @contextmanager
    def finishing(self, finish: Callable[[], None]) -> Iterator[None]:
        """Lets a signal call `finish`, which makes the block end soon, in place of the end at once.

        A Ctrl-C after that ends the process at once.
        """
        self._finish = finish
        try:
            yield
        finally:
            self._finish = None

    def _watch(self, reading: int) -> None:
        while numbers := os.read(reading, 1):
            if numbers[0] in self._before:
                self._take(numbers[0])
        os.close(reading)

    def _take(self, number: int) -> None:
        finish = self._finish
        if self.number is None and finish is not None:
            self.number = number
            finish()
            self._tell("stopping after the step that runs now; Ctrl-C ends it at once")
        elif self.number is None or number == signal.SIGINT:
            self._tell(self._where())
            os._exit(128 + number)


def _pass_over(number: int, frame: FrameType | None) -> None:
    """Takes the place of the default action; the thread reads the signal's number."""
