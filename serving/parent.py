"""What a process owes to the one that started it, if that one says so."""

import os
import signal
import sys
import threading
import time
from typing import NoReturn

PARENT_VARIABLE = "MIXTRAL_JAX_PARENT"
READY_VARIABLE = "MIXTRAL_JAX_READY_FD"  # of a pipe, for those that nobody can ask


def end_with_parent() -> None:
    """From now on, this process gets SIGTERM when the process that PARENT_VARIABLE names is gone.

    A killed parent sends no signal; its children are handed to another process, which shows. Who
    starts a server by hand sets no such variable, and may leave.
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
    """Tells it, by a byte in the pipe that READY_VARIABLE names, that this process works."""
    pipe = os.environ.get(READY_VARIABLE)
    if pipe is not None:
        os.write(int(pipe), b"1")


def end_process(status: int) -> NoReturn:
    """Ends this process at once, whatever its other threads are stuck in. Nothing is cleaned up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
