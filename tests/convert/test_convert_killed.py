"""A conversion that is killed leaves all or nothing; two at once leave one that is whole."""

import itertools
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from convert.convert import convert
from mixtral_jax.checkpoint.folder import is_checkpoint
from mixtral_jax.checkpoint.writer import ParameterWriter
from tests.support import sources

FILES, WEIGHTS = "file operations", "pieces of weights"


def big_source(folder: Path) -> Path:
    """A mixture of twelve layers, so that there is something to interrupt."""
    config = sources.MOE | dict(num_hidden_layers=12)
    small = sources.tensors(sources.MOE)
    hf = {name: value for name, value in small.items() if "layers" not in name}
    for i in range(12):
        for name, value in small.items():
            if "layers.0." in name:
                hf[name.replace("layers.0.", f"layers.{i}.")] = value
    return sources.write_hf(folder, config, hf, shards=3)


def run_and_die(source: Path, destination: Path, kind: str, moment: int, counted: Any) -> None:
    """Converts, and kills itself at a file operation or a written piece, by its number.

    `counted` has the operations of that kind. The store's own file operations, in C++, are not
    seen as such: that is why pieces of weights are counted too.
    """

    numbers = itertools.count(1)  # also where two threads count at once, each gets its own

    def count() -> None:
        counted.value = number = next(numbers)
        if number == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" or event.startswith(("os.", "shutil.")):
            count()

    if kind == FILES:
        sys.addaudithook(hook)
    else:
        write = ParameterWriter.write

        def counting(self: ParameterWriter, *arguments: Any) -> None:
            count()
            write(self, *arguments)

        ParameterWriter.write = counting  # type: ignore[method-assign]
    convert(source, destination)


def processes() -> Any:
    """Processes that have imported everything before they begin, so that little time is lost."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["convert.convert"])
    return context


@pytest.mark.slow
@pytest.mark.parametrize("kind", [FILES, pytest.param(WEIGHTS, marks=pytest.mark.soak)])
def test_killed_at_any_moment_it_leaves_all_or_nothing(tmp_path: Path, kind: str) -> None:
    path = big_source(tmp_path / "src")
    context = processes()

    def attempt(folder: Path, moment: int) -> tuple[int | None, int]:
        counted = context.Value("q", 0, lock=False)
        process = context.Process(target=run_and_die, args=(path, folder, kind, moment, counted))
        process.start()
        process.join()
        return process.exitcode, counted.value

    code, moments = attempt(tmp_path / "whole", 0)
    assert code == 0
    assert moments > 12 * 9  # a layer has nine parameters, of a piece or more each
    want = sources.parameters(tmp_path / "whole")
    generator = random.Random(0)
    for turn in range(3):
        folder = tmp_path / f"dst{turn}"
        # Threads share the work: a run may have a few file operations less than another.
        moment = int(0.95 * moments * (turn + generator.random()) / 3)
        assert attempt(folder, moment)[0] == -signal.SIGKILL
        if not is_checkpoint(folder):
            assert not folder.exists()
            assert attempt(folder, 0)[0] == 0
        sources.assert_same(sources.parameters(folder), want)
        assert not list(tmp_path.glob(".*"))


def run_and_report(source: Path, destination: Path, ready: Any, answers: Any) -> None:
    """Converts when all others are ready too, and reports the error, or an empty text."""
    try:
        ready.wait()
        convert(source, destination)
        answers.put("")
    except Exception as error:
        answers.put(f"{type(error).__name__}: {error}")


@pytest.mark.slow
def test_two_at_once_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    """The first to finish has the name; the other fails, and neither disturbs the other's work."""
    path = big_source(tmp_path / "src")
    context = processes()
    ready, answers = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=run_and_report, args=(path, tmp_path / "dst", ready, answers))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    outcomes = sorted(answers.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    assert outcomes[0] == ""
    assert outcomes[1].startswith("FileExistsError: ")
    convert(path, tmp_path / "alone")
    sources.assert_same(
        sources.parameters(tmp_path / "dst"), sources.parameters(tmp_path / "alone")
    )
    assert {file.name for file in tmp_path.iterdir()} == {"src", "dst", "alone"}
