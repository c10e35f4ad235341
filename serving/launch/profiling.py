"""JAX's profiler on a running server: SIGUSR1 starts it, SIGUSR2 ends it, and so does its time.

Each profile is a folder of its own, DIR/plugins/profile/TIME, with a file for XProf and TensorBoard
(*.xplane.pb) and one for Perfetto (*.trace.json.gz). A folder that cannot be
written to is refused at the start; what goes wrong later is logged, and never ends the process: a
profile is a look at a server, not a part of it.
"""

import logging
import queue
import signal
import tempfile
import threading
import time
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Protocol

from mixtral_jax.errors import ConfigError

_log = logging.getLogger(__name__)
_CLOSE_SECONDS = 30.0  # a profile that is being written is not waited for any longer


class Tracer(Protocol):
    """Records a trace of this process."""

    def start(self, folder: Path) -> None:
        """Begins to record, for a folder that exists."""

    def stop(self) -> None:
        """Ends the record, and writes it."""


class JaxTracer:
    """Records what JAX does on the host and on its devices, without the lines of Python."""

    def start(self, folder: Path) -> None:
        """Begins to record; raises RuntimeError if somebody else does."""
        import jax

        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow every function down
        jax.profiler.start_trace(folder, profiler_options=options)

    def stop(self) -> None:
        """Ends the record, and writes it."""
        import jax

        jax.profiler.stop_trace()


class Order(Enum):
    """Orders that a profiling thread takes."""

    START = signal.SIGUSR1
    STOP = signal.SIGUSR2
    END = None
    """Of the thread itself."""


class Profiling:
    """Profiles this process, one profile at a time, each for a bounded time, from a thread.

    Args:
        folder: Where profiles are written; None: orders are answered by a line in the log alone.
        seconds: Time after which a profile ends by itself.
        tracer: Records it.
    """

    def __init__(self, folder: Path | None, seconds: float, tracer: Tracer) -> None:
        self._folder = folder
        self._seconds = seconds
        self._tracer = tracer
        # Its `put` may be called by the handler of a signal, whatever that has interrupted.
        self._orders = queue.SimpleQueue[Order]()
        self._thread = threading.Thread(target=self._run, name="profile", daemon=True)

    def listen(self) -> None:
        """Starts the thread, and has signals give it orders; for the main thread.

        Raises ConfigError for a folder that cannot be made or written to.
        """
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self._folder).close()
            except OSError as error:
                raise ConfigError(
                    f"--profile is {self._folder}, which cannot be written to: {error.strerror}; "
                    "give another folder"
                ) from error
        self._thread.start()

        def order(number: int, frame: FrameType | None) -> None:
            self._orders.put(Order(number))

        for wanted in (Order.START, Order.STOP):
            signal.signal(wanted.value, order)

    def order(self, order: Order) -> None:
        """Gives the thread an order, which it carries out or refuses by a line in the log."""
        self._orders.put(order)

    def close(self) -> None:
        """Ends the profile that is recorded, if any, and waits a little until it is written."""
        self._orders.put(Order.END)
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while (order := self._orders.get()) is not Order.END:
            if self._folder is None:
                _log.warning("no profile is made: the server was started without --profile DIR")
            elif order is Order.STOP:
                _log.warning("no profile is ended: none is recorded; SIGUSR1 starts one")
            else:
                try:
                    self._record(self._folder)
                except Exception as error:
                    _log.error("the profile failed, and the server goes on: %s", error)

    def _record(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._tracer.start(folder)
        _log.info("a profile is recorded for %g s, or until SIGUSR2", self._seconds)
        began = time.monotonic()
        try:
            last = self._await_end(began + self._seconds)
            lasted = time.monotonic() - began
        finally:
            self._tracer.stop()
        _log.info("a profile of %.1f s is in %s", lasted, _newest(folder))
        # Orders that came while it was written are late.
        while last is not Order.END and not self._orders.empty():
            last = self._orders.get()
            if last is Order.START:
                _log.warning("no second profile is started: one was being written; try again")
        if last is Order.END:
            self._orders.put(last)

    def _await_end(self, deadline: float) -> Order:
        """Waits until the time has come or the order to end; refuses others meanwhile."""
        while (rest := deadline - time.monotonic()) > 0:
            try:
                order = self._orders.get(timeout=rest)
            except queue.Empty:
                break
            if order is not Order.START:
                return order
            _log.warning(
                "no second profile is started: one is recorded, and ends in %.0f s, or at SIGUSR2",
                deadline - time.monotonic(),
            )
        return Order.STOP


def _newest(folder: Path) -> Path:
    """Returns the folder of the profile that was written last."""
    made = [path for path in folder.glob("plugins/profile/*") if path.is_dir()]
    return max(made, key=lambda path: path.stat().st_mtime, default=folder)
