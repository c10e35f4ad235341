"""A checkpoint folder is complete or absent, whoever else writes to the same place."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.checkpoint.folder import Card, finished_at, is_checkpoint
from mixtral_jax.checkpoint.restore import load
from mixtral_jax.checkpoint.writer import save
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError, UserError
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sharding import make_mesh
from tests.support.models import model_of

CONFIG = ModelConfig.tiny(vocab_size=32)
CARD = Card(model=CONFIG, dtype="float32", name="toy", provider="nobody")
TOKENS = jnp.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return model_of(CONFIG, seed=2)


@pytest.fixture(scope="module")
def folder(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "toy"
    save(path, model, CARD, [])
    return path


@pytest.mark.slow
def test_what_is_saved_is_loaded(model: Transformer, folder: Path) -> None:
    loaded, card = load(folder)
    assert card == CARD
    np.testing.assert_array_equal(loaded(TOKENS), model(TOKENS))


def test_a_mesh_gets_its_shards(model: Transformer, folder: Path) -> None:
    loaded, _ = load(folder, make_mesh(data=1, expert=4, tensor=2))
    gate = loaded.layers[0].feed_forward.gate.weight.get_value()
    assert gate.shape == (4, 96, 64)
    assert {shard.data.shape for shard in gate.addressable_shards} == {(1, 48, 64)}
    logits = jax.jit(lambda model, tokens: model(tokens))
    np.testing.assert_allclose(logits(loaded, TOKENS), logits(model, TOKENS), rtol=0, atol=1e-5)


def test_the_stored_dtype_can_be_overridden(folder: Path) -> None:
    loaded, _ = load(folder, dtype="bfloat16")
    assert loaded.embed.weight.get_value().dtype == jnp.bfloat16


def test_an_error_leaves_nothing_and_a_stale_attempt_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with pytest.raises(RuntimeError), finished_at(path) as partial:
        (partial / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "left").write_text("x")
    with finished_at(path) as partial:
        (partial / "whole").write_text("x")
    assert [file.name for file in path.iterdir()] == ["whole"]
    with pytest.raises(FileExistsError, match="is not empty"), finished_at(path):
        pass


def test_two_at_once_each_have_a_folder_of_their_own(tmp_path: Path) -> None:
    """Interleaved: the first to finish gets the name, and all that it wrote."""
    path = tmp_path / "new"
    with finished_at(path) as first:
        (first / "params").mkdir()
        (first / "params" / "first").write_text("whole")
        with pytest.raises(FileExistsError, match="by another process"), finished_at(path) as late:
            (late / "params").mkdir()
            (late / "params" / "second").write_text("half")
            assert (first / "params" / "first").read_text() == "whole"
            with finished_at(path) as third:
                (third / "third").write_text("whole")
        assert first.exists()
        (path / "third").unlink()  # an empty folder may be replaced
    assert [file.name for file in (path / "params").iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [path]


def test_working_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """They are told from those of running ones by a lock, which ends with its process."""
    code = f"""
import os, sys
from pathlib import Path
from mixtral_jax.checkpoint.folder import finished_at
with finished_at(Path({str(tmp_path / "new")!r})) as partial:
    (partial / "half").write_text("x")
    print("here", flush=True)
    sys.stdin.read()
    os._exit(9)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "here\n"
        with finished_at(tmp_path / "new"):
            assert len(list(tmp_path.glob(".new.*.partial/new/half"))) == 1
        (tmp_path / "new").rmdir()
        process.stdin.close()
    assert process.returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    with finished_at(tmp_path / "new"):
        assert not list(tmp_path.glob(".new.*.partial/new/half"))
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


def test_without_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have no locks: a day is longer than any conversion."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    old, young = tmp_path / ".new.abc.partial", tmp_path / ".new.def.partial"
    for folder in (old, young):
        (folder / "new").mkdir(parents=True)
    two_days_ago = time.time() - 2 * 86_400
    os.utime(old, (two_days_ago, two_days_ago))
    with finished_at(tmp_path / "new"):
        pass
    assert {file.name for file in tmp_path.iterdir()} == {"new", young.name}


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "link").symlink_to("disk/real")
    (tmp_path / "dangling").symlink_to("disk/later")
    for name, target in (("link", "real"), ("dangling", "later")):
        with finished_at(tmp_path / name) as partial:
            assert partial.is_relative_to(tmp_path / "disk")
            (partial / "file").write_text("x")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "disk" / target / "file").read_text() == "x"


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_a_mount_point_is_refused_before_any_work(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux says EBUSY where a folder to be replaced is a mount point, and some systems EXDEV."""
    (tmp_path / "out").mkdir()

    def refuse(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "rename", refuse)
    with (
        pytest.raises(UserError, match="out is a mount point, .* name a folder in it, such as"),
        finished_at(tmp_path / "out"),
    ):
        pytest.fail("the work has begun")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_what_is_finished_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    with finished_at(tmp_path / "new"):
        pass
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_only_our_own_folders_are_checkpoints(tmp_path: Path) -> None:
    assert not is_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    assert not is_checkpoint(tmp_path)
    for text in ("{", "[]", "[" * 200_000):
        (tmp_path / "config.json").write_text(text)
        assert not is_checkpoint(tmp_path)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give the folder that"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    with pytest.raises(ConfigError, match="convert it first"):
        load(tmp_path)
