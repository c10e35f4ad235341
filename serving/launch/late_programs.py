"""Late programs: those of whole steps that a server compiles while it answers already.

Until one is there, its steps are padded to a larger bucket (mixtral_jax/step/whole_step.py). Those
that score prompts are compiled when somebody first asks for that (mixtral_jax/step/scores.py).
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from mixtral_jax.step.buckets import Steps

THREAD = "late programs"  # the beginning of its threads' names

_log = logging.getLogger(__name__)


class LatePrograms:
    """Compiles what is missing, in a thread of its own.

    Args:
        steps: those of the engine, some of whose programs may be missing.
        say: is called with a line when all are there.
    """

    def __init__(self, steps: Steps, say: Callable[[str], None]) -> None:
        self._steps, self._say = steps, say
        self._is_wanted = True
        self._is_preparing = False
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self._scores = ThreadPoolExecutor(1, thread_name_prefix=THREAD)

    def start(self) -> None:
        """Starts the thread, if anything is missing."""
        if self._steps.whole is not None and self._steps.whole.missing:
            self._thread.start()

    def prepare_scores(self) -> "Future[None]":
        """Begins to compile what logprobs of prompts need, unless that has been done.

        The first request that asks for them waits for it, and no other.
        """
        return self._scores.submit(self._prepare_scores)

    def stop(self) -> bool:
        """Begins no further program; returns False if one is under way, which nothing can end."""
        self._is_wanted = False
        self._scores.shutdown(wait=False, cancel_futures=True)
        return not (self._thread.is_alive() or self._is_preparing)

    def _prepare_scores(self) -> None:
        self._is_preparing = True
        try:
            self._steps.prepare_scores()
        finally:
            self._is_preparing = False

    def _run(self) -> None:
        whole = self._steps.whole
        assert whole is not None
        missing = whole.missing
        for key in missing:
            if not self._is_wanted:
                return
            try:
                whole.compile_one(key)
            except Exception:
                _log.exception(
                    "a program could not be compiled; steps go on with those that are there, "
                    "padded to larger ones"
                )
        if not whole.missing:
            self._say(f"all {len(missing)} programs that were missing are compiled")
