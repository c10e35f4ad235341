"""When a process is started again and when not, with a program that dies as it is told."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.launch.supervisor import SupervisorError, _Child, run_follower
from serving.parent import READY_VARIABLE

PATIENCE = 20.0
# Notes each of its starts; the first word of the file `fate` is its status, "live" none.
MORTAL = """
import pathlib, sys, time
here = pathlib.Path(__file__).parent
fate, _, rest = (here / "fate").read_text().partition(" ")
(here / "fate").write_text(rest)
with (here / "starts").open("a") as starts:  # last: whoever sees it may end this process
    starts.write("x")
if fate == "live":
    time.sleep(60)
sys.exit(int(fate))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mortal.py").write_text(MORTAL)
    return tmp_path


def child_of(folder: Path, fate: str) -> _Child:
    (folder / "fate").write_text(fate)
    return _Child("service", ["mortal"], {**os.environ, "PYTHONPATH": str(folder)})


def starts(folder: Path) -> int:
    file = folder / "starts"
    return len(file.read_text()) if file.exists() else 0


def keep_running(child: _Child, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not until():
        child.keep_running()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(child: _Child) -> None:
    if child.process is not None:
        child.process.kill()
        child.process.wait()


def test_what_never_served_is_not_tried_again(folder: Path) -> None:
    child = child_of(folder, "3 live")
    with pytest.raises(SupervisorError, match="the service ended with status 3; see above"):
        keep_running(child, lambda: False)
    assert starts(folder) == 1


def test_what_has_served_is_started_again_at_once(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    child = child_of(folder, "live live live")
    for number in (1, 2, 3):
        keep_running(child, lambda: starts(folder) == number)  # noqa: B023
        assert child.process is not None and not child.has_served
        child.has_served = True
        child.process.send_signal(signal.SIGKILL)
        child.process.wait()
    child.keep_running()
    assert (
        capfd.readouterr().err.splitlines()
        == ["mixtral-jax: the service ended with SIGKILL; it is started again now"] * 3
    )
    end(child)


def test_what_does_not_live_to_serve_again_is_given_up(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    child = child_of(folder, "live 1 2 3 4")
    keep_running(child, lambda: starts(folder) == 1)
    assert child.process is not None
    child.has_served = True
    child.process.kill()
    child.process.wait()

    def never() -> bool:
        child._start_at = 0.0  # which would be later each time
        return False

    with pytest.raises(SupervisorError, match="ended 4 times before it could serve, .* status 4"):
        keep_running(child, never)
    assert starts(folder) == 5
    assert [line.rpartition("again ")[2] for line in capfd.readouterr().err.splitlines()] == [
        "now",
        "in 1 s",
        "in 3 s",
        "in 7 s",
    ]


def test_status_0_means_that_it_was_told_to_end(folder: Path) -> None:
    child = child_of(folder, "0 live")
    keep_running(child, lambda: child.was_told_to_end)
    child.keep_running()
    assert starts(folder) == 1


def test_a_follower_says_itself_that_it_has_served(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It joins and is lost at once, joins again, and is then told to end."""
    (folder / "serving").mkdir()
    (folder / "serving" / "__init__.py").touch()
    (folder / "serving" / "__main__.py").write_text(
        "import os, pathlib, sys\n"
        "seen = pathlib.Path(__file__).with_name('seen')\n"
        f"os.write(int(os.environ[{READY_VARIABLE!r}]), b'1')\n"
        "if seen.exists(): sys.exit(0)\n"
        "seen.touch(); sys.exit(1)\n"
    )
    monkeypatch.chdir(folder)
    ready: list[str] = []
    run_follower(dict(os.environ), [], lambda: ready.append("ready"), drain_seconds=5)
    assert ready == ["ready"]
    said = capfd.readouterr().err.splitlines()
    assert said == ["mixtral-jax: the follower ended with status 1; it is started again now"]
