"""The event loop of a process that answers calls, and its collector of garbage."""

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_loop(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on the fastest event loop that there is, to its end.

    What is there already, the model and its programs, is left out by the collector from now on. How
    often it looks stays as it is: a refused call's message of 4 MB may be part of a circle.
    """
    gc.collect()
    gc.freeze()
    try:
        import uvloop
    except ImportError:  # it knows no Windows
        return asyncio.run(work)
    return uvloop.run(work)
