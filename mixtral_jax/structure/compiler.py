"""Compiler: what callers ask for, made into forms, without harm to the process that it runs in."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.cache import FormCache
from mixtral_jax.structure.form import Form, form_of
from mixtral_jax.structure.json_schema.checker import check_answer
from mixtral_jax.structure.matcher import Guide
from mixtral_jax.structure.specification import Check, Grammar, Kind, Specification
from mixtral_jax.structure.trial.process import Died, TrialProcess
from mixtral_jax.structure.trial.turns import Turns
from mixtral_jax.structure.wanted import Wanted, check_wanted, tried_grammar
from mixtral_jax.tokenization.tokenizer import Tokenizer

_STACK = 16 << 20  # bytes of the stack of the threads that compile; a trial has half of it
_MAX_BYTES = 64 << 20  # of forms that are kept
_DEATH_KEPT = 60.0  # seconds: a trial may also die because the machine is busy
_stack_size = threading.Lock()  # it is a setting of the whole process


@dataclass(frozen=True)
class _Refusal:
    message: str
    pointer: str
    until: float  # of time.monotonic()


@dataclass(frozen=True)
class _Job:
    wanted: Wanted
    space: bool
    key: bytes
    future: "Future[Form]"


@dataclass(frozen=True)
class _Checking:
    answer: str
    check: Check
    future: "Future[str | None]"


class Compiler:
    """Makes forms for one model. Thread-safe; to be closed.

    What is asked for is first compiled and matched for two tokens in a process that may die of it,
    and then here, by threads of its own: a request that waits occupies none of the caller's. Forms
    and refusals are kept, apart for each salt.

    Args:
        tokenizer: that of the model.
        width: V of the output layer, which may be more than the tokenizer's ids.
        processes: Number of processes that try; with 0 nothing is tried elsewhere, which is for
            a program that compiles what its own user wrote.
    """

    def __init__(self, tokenizer: Tokenizer, width: int, *, processes: int = 2) -> None:
        self._space = tokenizer.dummy_space
        self._guide: Guide | StructureError
        try:
            self._guide = Guide(tokenizer, width)
        except StructureError as error:
            self._guide = error
        self._cache: FormCache[Form | _Refusal] = FormCache(_MAX_BYTES)
        self._turns: Turns[_Job | _Checking] = Turns()
        self.trials = tuple(TrialProcess(tokenizer, width, _STACK // 2) for _ in range(processes))
        self._threads: list[threading.Thread] = []
        if isinstance(self._guide, Guide):
            works = [partial(self._work, trial) for trial in self.trials or (None,)]
            self._threads += _threads(works)

    def submit(self, wanted: Wanted, *, continues: bool, salt: bytes) -> "Future[Form]":
        """Begins to make the form of what is wanted; the future raises StructureError.

        Args:
            wanted: What the answer must match, the tools that it may call, or a grammar that our
                own code wrote.
            continues: Whether the answer continues a text, so that its first space is its own. A
                grammar of our own has that space where it is needed.
            salt: The caller's; forms are shared under the same salt only.
        """
        future: Future[Form] = Future()
        if isinstance(self._guide, StructureError):
            future.set_exception(self._guide)
            return future
        try:
            check_wanted(wanted)
        except StructureError as error:
            future.set_exception(error)
            return future
        space = self._space and not continues
        if isinstance(wanted, Specification) and wanted.kind is Kind.JSON_OBJECT:
            salt = b""  # it says nothing about who asks
        job = _Job(wanted, space, _key(wanted, space), future)
        if not self._answer_from_cache(salt, job):
            self._put(salt, job)
        return future

    def compile(self, wanted: Wanted, *, continues: bool, salt: bytes) -> Form:
        """Returns the form of what is wanted; see `submit`.

        Raises StructureError, NotStarted, and CancelledError after `close`.
        """
        return self.submit(wanted, continues=continues, salt=salt).result()

    def check(self, answer: str, check: Check, *, salt: bytes) -> str | None:
        """Returns what is wrong with a finished answer, or None; see `check_answer`.

        It is checked where forms are tried, because the patterns of a schema may take all memory.
        Raises NotStarted, and CancelledError after `close`.
        """
        if not self.trials:
            return check_answer(answer, check.schema, check.draft)
        job = _Checking(answer, check, Future())
        self._put(salt, job)
        return job.future.result()

    def close(self) -> None:
        """Ends the threads and processes. Requests that still wait are cancelled."""
        for job in self._turns.close():
            job.future.cancel()
        for thread in self._threads:
            thread.join()
        for trial in self.trials:
            trial.close()

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, salt: bytes, job: _Job | _Checking) -> None:
        try:
            self._turns.put(salt, job)
        except RuntimeError:  # closed
            job.future.cancel()

    def _work(self, trial: TrialProcess | None) -> None:
        """Serves requests until the end, with one trial process."""
        if trial is not None:
            _quietly(trial.start)
        while (turn := self._turns.take()) is not None:
            salt, job = turn
            begin = time.monotonic()
            try:
                if not job.future.set_running_or_notify_cancel():
                    continue
                if isinstance(job, _Checking):
                    self._check(trial, job)
                else:
                    self._make(trial, salt, job)
                if trial is not None:
                    _quietly(trial.start)  # if it died; this caller's next request waits for it
            finally:
                self._turns.finish(salt, time.monotonic() - begin)

    def _check(self, trial: TrialProcess | None, job: _Checking) -> None:
        assert trial is not None
        try:
            job.future.set_result(trial.check(job.answer, job.check))
        except BaseException as error:
            job.future.set_exception(error)

    def _make(self, trial: TrialProcess | None, salt: bytes, job: _Job) -> None:
        if self._answer_from_cache(salt, job):
            return
        try:
            form, size = self._made(trial, job)
        except StructureError as error:
            until = time.monotonic() + _DEATH_KEPT if isinstance(error, Died) else float("inf")
            refusal = _Refusal(str(error), error.pointer, until)
            self._cache.put(salt, job.key, refusal, len(refusal.message) + 1024)
            job.future.set_exception(StructureError(refusal.message, refusal.pointer))
        except BaseException as error:
            job.future.set_exception(error)
        else:
            self._cache.put(salt, job.key, form, size)
            job.future.set_result(form)

    def _made(self, trial: TrialProcess | None, job: _Job) -> tuple[Form, int]:
        """Returns the form of a job, and about how many bytes it takes."""
        assert isinstance(self._guide, Guide)
        if trial is not None:
            grammar = trial.trial(job.wanted, space=job.space)
        elif isinstance(job.wanted, Grammar):
            grammar = job.wanted  # as it is; the form itself is the trial
        else:
            attempt = partial(form_of, guide=self._guide)
            grammar = tried_grammar(job.wanted, space=job.space, attempt=attempt)
        return form_of(grammar, self._guide), _size(grammar)

    def _answer_from_cache(self, salt: bytes, job: _Job) -> bool:
        kept = self._cache.get(salt, job.key)
        if isinstance(kept, Form):
            job.future.set_result(kept)
        elif isinstance(kept, _Refusal) and time.monotonic() < kept.until:
            job.future.set_exception(StructureError(kept.message, kept.pointer))
        else:
            return False
        return True


def _key(wanted: Wanted, space: bool) -> bytes:
    """Returns what stands for a request in the cache."""
    return hashlib.sha256(f"{space} {wanted!r}".encode("utf-8", "replace")).digest()


def _size(grammar: Grammar) -> int:
    """Returns about how many bytes a form takes: measured, see benchmarks/structure.py."""
    kept = sum(len(check.schema) for check in grammar.checks)
    return (100 << 10) + 40 * len(grammar.text) + kept


def _threads(works: Iterable[Callable[[], None]]) -> list[threading.Thread]:
    """Starts threads with the stack that trials are measured against."""
    threads = [threading.Thread(target=work, name="grammars", daemon=True) for work in works]
    with _stack_size:
        before = threading.stack_size(_STACK)
        try:
            for thread in threads:
                thread.start()
        finally:
            threading.stack_size(before)
    return threads


def _quietly(start: Callable[[], None]) -> None:
    """Starts a process; where that fails, the next request tries again and gets the error."""
    try:
        start()
    except (RuntimeError, OSError):
        return
