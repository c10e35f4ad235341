"""What a folder of checkpoints keeps, and refuses."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.errors import ConfigError
from mixtral_jax.training.checkpoints import Checkpoints
from mixtral_jax.training.step.training_step import TrainingState

FACTS = {"seed": 3, "keep": 2, "adapter": {"targets": ("q", "k")}}


def state_of(value: float, step: int) -> TrainingState:
    count = jnp.array(0, jnp.int32)
    return TrainingState(
        {"w": jnp.full((2, 3), value)}, {}, jnp.array(step, jnp.int32), count, count
    )


ABSTRACT = jax.eval_shape(lambda: state_of(0.0, 0))


def test_the_last_states_are_kept_and_come_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, FACTS)
    assert checkpoints.latest is None
    for step in (10, 20, 30):
        checkpoints.save(state_of(step / 7, step), step)
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {"20", "30"}
    state = Checkpoints(tmp_path, 2, FACTS).restore(ABSTRACT)
    np.testing.assert_array_equal(state.trained["w"], np.full((2, 3), 30 / 7, np.float32))
    assert int(state.step) == 30


def test_another_run_is_refused_by_the_setting_that_differs(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, FACTS)
    checkpoints.save(state_of(1.0, 10), 10)
    checkpoints.close()
    with pytest.raises(ConfigError, match=r"of a run with seed=3, and this run has seed=4"):
        Checkpoints(tmp_path, 2, {**FACTS, "seed": 4}).restore(ABSTRACT)
    with pytest.raises(ConfigError, match="with data=None, and this run has data=abc"):
        Checkpoints(tmp_path, 2, {**FACTS, "data": "abc"}).restore(ABSTRACT)
    more = Checkpoints(tmp_path, 5, {**FACTS, "keep": 5}, frozenset({"keep"}))
    assert int(more.restore(ABSTRACT).step) == 10


def test_half_a_checkpoint_is_never_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 3, FACTS)
    for step in (10, 20):
        checkpoints.save(state_of(1.0, step), step)
    checkpoints.close()
    # Orbax writes under such a name until everything is there.
    (tmp_path / "20").rename(tmp_path / "20.orbax-checkpoint-tmp")
    again = Checkpoints(tmp_path, 3, FACTS)
    assert again.latest == 10 and int(again.restore(ABSTRACT).step) == 10


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 3, FACTS)
    checkpoints.save(state_of(1.0, 10), 10)
    checkpoints.close()
    for file in (tmp_path / "10").rglob("*"):
        if file.is_file() and "METADATA" not in file.name and "commit" not in file.name:
            file.write_bytes(b"")
    # In a process of its own: at the first array that it cannot read, Orbax closes its event loop
    # and lets the reads of the others end whenever they do, as warnings of some later test.
    restoring = (
        "import sys; from pathlib import Path\n"
        "from tests.mixtral_jax.training.test_checkpoints import ABSTRACT, FACTS, Checkpoints\n"
        "Checkpoints(Path(sys.argv[1]), 3, FACTS).restore(ABSTRACT)"
    )
    command = [sys.executable, "-c", restoring, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "CheckpointError: the checkpoint" in ran.stderr
    assert "10 cannot be read; remove it" in ran.stderr
