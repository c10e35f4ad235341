"""The process that tries grammars: it dies, is started anew, and never outlives its parent."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.specification import Check, Grammar, Kind, Specification
from mixtral_jax.structure.trial import process as trial_process
from mixtral_jax.structure.trial.process import LONGEST_CHECK, Died, NotStarted, TrialProcess
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer

GOOD = Specification(Kind.REGEX, "[ab]+")
ENDLESS = Grammar("start: A\nA: /(.*a.{12}.*)/ & /(.*b.{12}.*)/ & ~/(.*c.{13}.*)/")


@pytest.fixture
def trial() -> Iterator[TrialProcess]:
    trial = TrialProcess(ByteTokenizer(), 300, 8 << 20)
    trial.start()
    yield trial
    trial.close()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time enough for what must be answered, also on a busy machine."""
    monkeypatch.setattr(trial_process, "LONGEST_TRIAL", 60.0)
    monkeypatch.setattr(trial_process, "LONGEST_CHECK", 60.0)


def process_of(trial: TrialProcess) -> psutil.Process:
    assert trial.pid is not None
    return psutil.Process(trial.pid)


def test_it_answers_with_the_grammar_or_the_refusal(trial: TrialProcess) -> None:
    grammar = trial.trial(GOOD, space=True)
    assert '" "' in grammar.text and "[ab]+" in grammar.text
    assert '" "' not in trial.trial(GOOD, space=False).text
    with pytest.raises(StructureError, match="look-around") as caught:
        trial.trial(Specification(Kind.REGEX, "(?=a)"), space=False)
    assert not isinstance(caught.value, Died)
    assert trial.starts == 1


def test_it_imports_no_jax(trial: TrialProcess) -> None:
    maps = Path(f"/proc/{trial.pid}/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    text = maps.read_text(encoding="utf-8")
    assert "llguidance" in text
    assert "jaxlib" not in text


def test_a_process_that_was_killed_is_started_anew(trial: TrialProcess) -> None:
    process_of(trial).kill()
    process_of(trial).wait()
    assert "[ab]+" in trial.trial(GOOD, space=False).text
    assert trial.starts == 2


@pytest.mark.usefixtures("patience")
def test_a_process_that_is_killed_in_the_middle_of_a_trial_is_replaced_once(
    trial: TrialProcess,
) -> None:
    """Whoever killed it meant something else: the structure is no worse for it."""
    for wanted, starts in ((GOOD, 2), (Check('{"type": "string"}', "draft2020-12"), 3)):
        process = process_of(trial)
        process.suspend()  # so that it is killed before it answers
        killing = threading.Timer(0.3, process.kill)
        killing.start()
        if isinstance(wanted, Check):
            assert trial.check('"a"', wanted) is None
        else:
            assert "[ab]+" in trial.trial(wanted, space=False).text
        killing.join()
        assert trial.starts == starts


@pytest.mark.usefixtures("patience")
def test_a_process_that_dies_of_a_trial_is_not_tried_again(
    trial: TrialProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = process_of(trial)
    process.suspend()
    killing = threading.Timer(0.3, lambda: (process.send_signal(signal.SIGSEGV), process.resume()))
    ask = trial._ask

    def ask_and_die(line: bytes, seconds: float) -> Any:
        killing.start()  # not before: a process that is dead when it is asked is replaced
        return ask(line, seconds)

    monkeypatch.setattr(trial, "_ask", ask_and_die)
    with pytest.raises(Died, match="make it smaller"):
        trial.trial(GOOD, space=False)
    killing.join()
    assert trial.starts == 1


def test_its_memory_is_bounded(trial: TrialProcess) -> None:
    """A grammar of many megabytes takes gigabytes to compile; here it may also take too long."""
    wide = "start: " + " | ".join(f'"{i}"' for i in range(300_000))
    with pytest.raises(StructureError):
        trial.trial(Grammar(wide), space=False)
    assert "[ab]+" in trial.trial(GOOD, space=False).text
    if sys.platform == "linux":
        soft, _ = process_of(trial).rlimit(psutil.RLIMIT_AS)
        assert 1 << 30 < soft < 4 << 30


@pytest.mark.slow
def test_a_trial_ends_after_two_seconds(trial: TrialProcess) -> None:
    with pytest.raises(Died, match="2 seconds"):
        trial.trial(ENDLESS, space=False)
    assert trial.pid is None
    assert "[ab]+" in trial.trial(GOOD, space=False).text


def test_it_tells_what_a_finished_answer_is_checked_against(trial: TrialProcess) -> None:
    text = '{"type": "array", "uniqueItems": true}'
    grammar = trial.trial(Specification(Kind.JSON_SCHEMA, text), space=False)
    assert grammar.checks == (Check(text, "draft2020-12"),)


def test_a_signal_of_the_terminal_does_not_end_it(trial: TrialProcess) -> None:
    os.kill(process_of(trial).pid, signal.SIGINT)
    assert "[ab]+" in trial.trial(GOOD, space=False).text
    assert trial.starts == 1


def test_it_ends_with_its_parent_even_in_an_endless_trial() -> None:
    code = f"""
    import os, threading, time
    from mixtral_jax.structure.specification import Check, Grammar
    from mixtral_jax.structure.trial.process import TrialProcess
    from mixtral_jax.tokenization.toy_bytes import ByteTokenizer

    trial = TrialProcess(ByteTokenizer(), 300, 8 << 20)
    trial.start()
    print(trial.pid, flush=True)
    endless = Grammar({ENDLESS.text!r})
    threading.Thread(target=lambda: trial.trial(endless, space=False), daemon=True).start()
    time.sleep(0.3)
    os.kill(os.getpid(), 9)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    pid = int(done.stdout)
    for _ in range(300):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.1)
    pytest.fail("the process outlived its parent")


@pytest.mark.usefixtures("patience")
def test_an_answer_is_checked_where_its_schema_may_do_no_harm(
    trial: TrialProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    unique = Check('{"uniqueItems": true}', "draft2020-12")
    assert trial.check("[1]", unique) is None
    assert "equal" in (trial.check("[1, 1]", unique) or "")
    # jsonschema matches the names of "unevaluatedProperties" by `re`, which takes hours for this.
    backtracking = {
        "allOf": [{"patternProperties": {"^(a+)+$": {}}}],
        "unevaluatedProperties": False,
    }
    # The package regex writes out 216 million letters for this.
    memory = {"pattern": "(?:(?:(?:a{600}){600}){600})?"}
    name = "a" * 50 + "b"
    for answer, schema in ((f'{{"{name}": 1}}', backtracking), ('"a"', memory)):
        with monkeypatch.context() as impatience:
            impatience.setattr(trial_process, "LONGEST_CHECK", LONGEST_CHECK)
            late = trial.check(answer, Check(json.dumps(schema), "draft2020-12"))
        assert late == "the answer could not be checked in time"
    assert trial.check("[1]", unique) is None


def test_a_process_that_cannot_start_is_no_fault_of_the_structure(
    trial: TrialProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process_of(trial).kill()
    process_of(trial).wait()
    monkeypatch.setattr(sys, "executable", "/nowhere")
    with pytest.raises(NotStarted, match="does not start"):
        trial.trial(GOOD, space=False)
