"""Duties of a process to the supervisor that started it; without a supervisor they do nothing."""

import contextlib
import os
import signal
import sys
import threading
import time
from typing import NoReturn

PARENT_VARIABLE = "MIXTRAL_JAX_PARENT"
READY_VARIABLE = "MIXTRAL_JAX_READY_FD"  # of a pipe, for processes that open no port
BEAT_VARIABLE = "MIXTRAL_JAX_BEAT_FD"
"""Environment variable with the file descriptor of a pipe. A service writes a byte into it every
second while its loop runs and its engine makes steps; the supervisor kills it when that stops."""

PIPE_VARIABLE = "MIXTRAL_JAX_PIPE_FD"
"""Environment variable with the descriptor of a text process's way to its engine's process."""


def end_with_parent() -> None:
    """Makes this process get SIGTERM when the process that PARENT_VARIABLE names is gone.

    A killed parent sends no signal, but its children get another parent, which a thread looks for
    every second. Without the variable, as in a server started by hand, nothing happens.
    """
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None:
        return

    def watch() -> None:
        while str(os.getppid()) == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def tell_parent() -> None:
    """Tells the parent that this process works, by a byte in the pipe that READY_VARIABLE names."""
    pipe = os.environ.get(READY_VARIABLE)
    if pipe is not None:
        os.write(int(pipe), b"1")


def beat() -> None:
    """Tells the parent that this process still works, by a byte in the pipe that BEAT_VARIABLE
    names.

    To be called every second from the event loop, as long as all goes on; the first time when
    the process serves, because starting takes long. A full pipe loses the byte.
    """
    pipe = os.environ.get(BEAT_VARIABLE)
    if pipe is not None:
        # The pipe may be full, or its reader gone, or it may be another process's variable.
        with contextlib.suppress(OSError):
            os.set_blocking(int(pipe), False)
            os.write(int(pipe), b"1")


def end_process(status: int) -> NoReturn:
    """Ends this process at once, even if its other threads are stuck. Nothing is cleaned up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
