"""The folder of a run: one run at a time, and a line for each thing that is wrong with it."""

import errno
import multiprocessing
from pathlib import Path

import pytest

from mixtral_jax.cli.train.output import (
    check_result,
    claimed,
    disk_errors,
    last_saved,
    resumption,
)
from mixtral_jax.errors import ConfigError, UserError


def _claim(folder: Path, ready: "multiprocessing.SimpleQueue[str]") -> None:
    with claimed(folder):
        ready.put("claimed")
        multiprocessing.Event().wait(60)


def test_a_folder_is_refused_while_another_process_uses_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs/one"
    context = multiprocessing.get_context("spawn")
    ready = context.SimpleQueue()
    process = context.Process(target=_claim, args=(folder, ready))
    process.start()
    assert ready.get() == "claimed"
    with pytest.raises(ConfigError, match=rf"another run uses {folder} now"), claimed(folder):
        pass
    process.kill()
    process.join()
    with claimed(folder):
        assert list(folder.iterdir()) == []
    assert not folder.exists()  # the claim leaves nothing


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refusal = pytest.raises(UserError, match=r"cannot write to .*file/run: Not a directory")
    with refusal, claimed(tmp_path / "file/run"):
        pass


def test_where_a_run_goes_on(tmp_path: Path) -> None:
    assert resumption(tmp_path) == "stopped; nothing is saved yet, and the same command begins anew"
    for name in ("9", "12", "15.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert last_saved(tmp_path) == 12
    assert "step 12 is saved in" in resumption(tmp_path)


def test_an_adapter_of_another_run_is_not_kept_for_this_one(tmp_path: Path) -> None:
    result = tmp_path / "adapter"
    check_result(tmp_path, result, 12)
    result.mkdir()
    with pytest.raises(ConfigError, match="is at step 0 of 12; give the settings"):
        check_result(tmp_path, result, 12)
    (tmp_path / "checkpoints/12").mkdir(parents=True)
    check_result(tmp_path, result, 12)


def test_a_full_disk_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/12").mkdir(parents=True)
    full = OSError(errno.ENOSPC, "No space left on device")
    for error in (full, ValueError("RESOURCE_EXHAUSTED: write: No space left on device [28]")):
        refusal = pytest.raises(UserError, match=r"(?i)no space left.* goes on from step 12")
        with refusal, disk_errors(tmp_path):
            raise RuntimeError("while it was saved") from error
    with pytest.raises(RuntimeError, match="a fault"), disk_errors(tmp_path):
        raise RuntimeError("a fault")
