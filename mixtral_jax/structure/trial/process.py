"""TrialProcess: the parent's side of one process that tries grammars."""

import base64
import contextlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.specification import Check, Grammar
from mixtral_jax.structure.wanted import Wanted
from mixtral_jax.tokenization.tokenizer import Tokenizer

LONGEST_TRIAL = 2.0  # seconds
LONGEST_START = 60.0  # seconds
LONGEST_CHECK = 3.0  # seconds, of which loading jsonschema takes some at the first one
_LONGEST_END = 1.0  # seconds
_LARGEST_ANSWER = 64 << 20  # bytes
_TOO_MUCH = "the structure cannot be compiled: make it smaller, or nest it less"
# A trial that dies of itself gets another signal: SIGSEGV of its stack, SIGABRT of its memory.
_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGHUP})
_PACKAGES = Path(__file__).parents[3]


class Died(StructureError):
    """A trial whose process died, or did not end in time."""


class Killed(Died):
    """A trial whose process was killed from outside, perhaps for the memory of others."""


class NotStarted(RuntimeError):
    """The process that tries cannot be started: a fault of the machine, not of the structure."""


class TrialProcess:
    """A process that tries one grammar after the other, and is started anew when it dies.

    Used by one thread. Starting takes half a second, which `start` does not wait for.

    Args:
        tokenizer: that of the model.
        width: V of the output layer.
        stack: bytes of the stack of the thread that compiles.
    """

    def __init__(self, tokenizer: Tokenizer, width: int, stack: int) -> None:
        size = tokenizer.vocab_size
        pieces = [tokenizer.token_bytes(i) if i < size else b"" for i in range(width)]
        opening = {
            "pieces": ",".join(base64.b64encode(piece).decode() for piece in pieces),
            "eos_ids": sorted(tokenizer.eos_ids),
            "stack": stack,
        }
        self._opening = json.dumps(opening).encode() + b"\n"
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self.starts = 0
        """How often the process was started."""

    @property
    def pid(self) -> int | None:
        """Id of the process; None while there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts the process and waits until it can try. Raises NotStarted if it cannot."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self.starts += 1
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mixtral_jax.structure.trial"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # a Rust panic writes the caller's text
                env={**os.environ, "PYTHONPATH": _with_packages(), "OPENBLAS_NUM_THREADS": "1"},
            )
            answer = self._ask(self._opening, LONGEST_START)
        except (Died, OSError) as error:
            raise NotStarted(f"the process that tries grammars does not start: {error}") from None
        assert answer == {"ready": True}, answer

    def close(self) -> None:
        """Ends the process."""
        process, self._process, self._rest = self._process, None, b""
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def trial(self, wanted: Wanted, *, space: bool) -> Grammar:
        """Returns the grammar of what is wanted, which was compiled and matched for two tokens.

        Raises StructureError; Died if the process had to be killed or died; NotStarted.
        """
        # Pickled towards the child alone, which may be anything once it has read what callers send.
        request = {"wanted": base64.b64encode(pickle.dumps(wanted)).decode(), "space": space}
        answer = self._answer(request, LONGEST_TRIAL)
        if "error" in answer:
            raise StructureError(answer["error"], answer["pointer"])
        if isinstance(wanted, Grammar):
            return wanted
        return Grammar(
            answer["text"],
            answer["begins_after"],
            tuple(answer["weakened"]),
            tuple(Check(*check) for check in answer["checks"]),
        )

    def check(self, answer: str, check: Check) -> str | None:
        """Returns why an answer is not valid under a schema, or None if it is; see `check_answer`.

        What the process dies of, or does not check in time, is reported as wrong.
        Raises NotStarted.
        """
        request = {"answer": answer, "schema": check.schema, "draft": check.draft}
        try:
            reply = self._answer(request, LONGEST_CHECK)
        except Died:
            return "the answer could not be checked in time"
        violation: str | None = reply["violation"]
        return violation

    def _answer(self, request: dict[str, Any], seconds: float) -> Any:
        """Returns what the process answers to a request; once more if it was killed from outside.

        Raises Died and NotStarted.
        """
        line = json.dumps(request).encode() + b"\n"
        for is_last in (False, True):
            self.start()
            try:
                return self._ask(line, seconds)
            except Died as error:
                self.close()
                if is_last or not isinstance(error, Killed):
                    raise
        raise AssertionError("the last try returns or raises")

    def _ask(self, line: bytes, seconds: float) -> Any:
        """Returns what the process answers to a line. Raises Died."""
        process, deadline = self._process, time.monotonic() + seconds
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except OSError:
            raise self._death(process) from None
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while b"\n" not in self._rest:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not poll.poll(remaining * 1000):
                raise Died(
                    f"the structure takes more than {seconds:.0f} seconds to compile: make it "
                    "smaller"
                )
            data = os.read(process.stdout.fileno(), 1 << 20)
            if not data:
                raise self._death(process)
            if len(self._rest) > _LARGEST_ANSWER:
                raise Died(_TOO_MUCH)
            self._rest += data
        answer, _, self._rest = self._rest.partition(b"\n")
        return json.loads(answer)

    @staticmethod
    def _death(process: "subprocess.Popen[bytes]") -> Died:
        """Returns the error of a process that has closed its pipes."""
        try:
            status = process.wait(_LONGEST_END)
        except subprocess.TimeoutExpired:
            return Died(_TOO_MUCH)
        return (Killed if -status in _FROM_OUTSIDE else Died)(_TOO_MUCH)


def _with_packages() -> str:
    """Returns the PYTHONPATH on which the child finds our packages, installed or not."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(_PACKAGES), *([given] if given else [])])
