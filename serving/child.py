"""A process that is started, watched, and started again when it dies or stands still."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from serving.errors import SetupError
from serving.parent import BEAT_VARIABLE, PIPE_VARIABLE


class SupervisorError(SetupError):
    """A server that did not start, or died; the message names it and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Restarts:
    """Says when a process that has died is started again.

    After the first death it is started at once, then after 1, 3, 7 ... seconds.
    """

    settled_seconds: float = 60.0
    """Seconds of serving after which earlier deaths no longer count."""
    longest_wait: float = 30.0
    """Maximum number of seconds between a death and the next start."""
    max_failures: int = 4
    """Number of starts in a row, each dead before it could serve, after which it is given up."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Holds the question that a process must answer while it serves, or be killed."""

    answers: Callable[[], bool]
    """Asks the process; returns within a few seconds."""
    interval: float = 10.0
    """Seconds from one question to the next."""
    max_failures: int = 6
    """Number of questions in a row without an answer after which the process is killed."""


class Child:
    """A process of `python -m`, which is started again when it dies.

    Args:
        name: Its name in messages.
        command: The module and its arguments.
        environment: The environment of the process.
        pipes: File descriptors that it inherits.
        restarts: When it is started again.
        beat_seconds: Maximum number of seconds between two bytes that the process writes into the
            pipe that BEAT_VARIABLE names, counted from the first; a process that is late is
            killed. None: no pipe is opened.
        probe: A question that is asked while the process serves.
        connect: Called at each start; returns a descriptor that the process inherits as its own,
            which PIPE_VARIABLE names. None: there is none.
        clock: Time in seconds that never goes back.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: dict[str, str],
        pipes: Sequence[int] = (),
        *,
        restarts: Restarts | None = None,
        beat_seconds: float | None = None,
        probe: Probe | None = None,
        connect: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.name = name
        self._command = [sys.executable, "-m", *command]
        self._environment = environment
        self._pipes = tuple(pipes)
        self._restarts = restarts or Restarts()
        self._beat_seconds = beat_seconds
        self._probe = probe
        self._connect = connect
        self._clock = clock
        self._served_at: float | None = None  # when it first served since its last start
        self._has_ever_served = False
        self._start_at = clock()
        self._deaths = 0  # without `settled_seconds` of serving between them
        self._failures = 0  # of them the latest in a row that had not served
        self._beats: int | None = None  # the end of the pipe that is read
        self._last_beat: float | None = None
        self._probe_at = 0.0
        self._unanswered = 0

    @property
    def has_served(self) -> bool:
        """True if it has served since its last start."""
        return self._served_at is not None

    @property
    def has_beaten(self) -> bool:
        """True if its heartbeat has begun since its last start and has not been missed."""
        return self._last_beat is not None

    @property
    def was_told_to_end(self) -> bool:
        """True if it has ended with status 0."""
        return self.process is not None and self.process.poll() == 0

    def note_serving(self) -> None:
        """Notes that the process serves now."""
        if self._served_at is None:
            self._served_at = self._clock()
            self._probe_at = self._served_at

    def keep_running(self) -> None:
        """Starts the process if it does not run and it is time to; kills it if it stands still.

        Raises SupervisorError to give up.
        """
        if self.process is None:
            if self._clock() >= self._start_at:
                self._start()
            return
        status = self.process.poll()
        if status is None:
            reason = self._standstill()
            if reason is not None:
                _print(f"the {self.name} {reason}; it is killed")
                self.process.kill()  # which ends a stopped process too
        elif status != 0:
            self.process = None
            self._note_death(status)

    def close(self) -> None:
        """Closes the pipe of the heartbeat. The process is not touched."""
        if self._beats is not None:
            os.close(self._beats)
            self._beats = None

    def _start(self) -> None:
        self.close()
        self._served_at = self._last_beat = None
        self._unanswered = 0
        given: dict[str, int] = {}  # descriptors of the process alone, by their variables
        if self._beat_seconds is not None:
            self._beats, writing = os.pipe()
            os.set_blocking(self._beats, False)
            given[BEAT_VARIABLE] = writing
        if self._connect is not None:
            given[PIPE_VARIABLE] = self._connect()
        try:
            self.process = subprocess.Popen(
                self._command,
                env={**self._environment, **{name: str(fd) for name, fd in given.items()}},
                start_new_session=True,
                pass_fds=(*self._pipes, *given.values()),
            )
        finally:
            for descriptor in given.values():
                os.close(descriptor)

    def _standstill(self) -> str | None:
        """Returns why the running process must be killed; None while it moves."""
        now = self._clock()
        if self._beats is not None and self._beat_seconds is not None:
            with suppress(BlockingIOError):
                if os.read(self._beats, 4096):
                    self._last_beat = now
                else:  # closed: the process ends
                    self._last_beat = None
                    self.close()
            if self._last_beat is not None and now - self._last_beat > self._beat_seconds:
                self._last_beat = None
                return f"has not moved for {self._beat_seconds:g} s"
        if self._probe is not None and self.has_served and now >= self._probe_at:
            self._unanswered = 0 if self._probe.answers() else self._unanswered + 1
            self._probe_at = self._clock() + self._probe.interval
            if self._unanswered >= self._probe.max_failures:
                return f"did not answer {self._unanswered} times"
        return None

    def _note_death(self, status: int) -> None:
        how = f"status {status}" if status > 0 else signal.Signals(-status).name
        rules = self._restarts
        if self._served_at is None:
            self._failures += 1
        else:
            self._has_ever_served, self._failures = True, 0
            if self._clock() - self._served_at >= rules.settled_seconds:
                self._deaths = 0
        if not self._has_ever_served:
            raise SupervisorError(f"the {self.name} ended with {how}; see above")
        if self._failures == rules.max_failures:
            raise SupervisorError(
                f"the {self.name} ended {self._failures} times before it could serve, the last "
                f"time with {how}; see above"
            )
        delay = min(2**self._deaths - 1, rules.longest_wait)
        self._deaths = min(self._deaths + 1, 32)
        self._start_at = self._clock() + delay
        when = f"in {delay:g} s" if delay else "now"
        _print(f"the {self.name} ended with {how}; it is started again {when}")


def _print(text: str) -> None:
    print(f"mixtral-jax: {text}", file=sys.stderr, flush=True)
