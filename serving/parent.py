"""A process that must not outlive the one that started it, if that one says so."""

import os
import signal
import threading
import time

PARENT_VARIABLE = "MIXTRAL_JAX_PARENT"


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
