"""A process that must not outlive the one that started it."""

import os
import signal
import threading
import time


def end_with_parent() -> None:
    """From now on, this process gets SIGTERM when its parent is gone.

    A killed parent sends no signal; its children are handed to another process, which shows.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
