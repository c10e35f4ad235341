"""Checkpoints of a run: everything that it needs to go on as if it had not ended.

    FOLDER/
        120/    trained arrays, moments and counters after 120 steps; and the facts of the run
        140/

Orbax writes them in the background, under another name until they are complete, so that a folder
with a number holds a whole checkpoint. The place in the data is the number of the step.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from mixtral_jax.errors import CheckpointError, ConfigError
from mixtral_jax.training.step.training_step import TrainingState

# A run as plain values: its settings, its model and its data.
Facts = Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run in a folder, of which the last `keep` stay.

    Every process of a group makes one and calls the same methods, on a folder that all of them see.

    Args:
        folder: made if it is not there.
        keep: number of checkpoints that stay.
        facts: what the run is; a run of other facts does not go on from here.
        changeable: names of facts that may differ.
    """

    def __init__(
        self, folder: Path, keep: int, facts: Facts, changeable: frozenset[str] = frozenset()
    ) -> None:
        self.folder = folder.absolute()
        # The same form as they come back in: lists in place of tuples.
        self._facts: Facts = json.loads(json.dumps(facts))
        self._changeable = changeable
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """Steps of the last complete checkpoint; None where there is none."""
        latest = self._orbax.latest
        return None if latest is None else int(latest.step)

    def save(self, state: TrainingState, step: int) -> None:
        """Begins to write the state after `step` steps; returns once the arrays may change."""
        self._orbax.wait()  # for the checkpoint before
        arrays = {name: _kept(array) for name, array in _named(state).items()}
        self._orbax.save_async(
            step, arrays, force=True, overwrite=True, custom_metadata={**self._facts}
        )

    def restore(self, abstract: TrainingState) -> TrainingState:
        """Reads the last checkpoint onto the devices that `abstract` names.

        Raises ConfigError where it is of a run of other facts, naming the first of them, and
        CheckpointError where its files are damaged.
        """
        step = self.latest
        assert step is not None, "there is no checkpoint"
        folder = self.folder / str(step)
        self._check_facts(folder, self._orbax.metadata(step).custom_metadata or {})
        names = _named(abstract)
        only = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {
            name: shape
            if shape.sharding is not None
            else jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=only)
            for name, shape in names.items()
        }
        try:
            arrays = self._orbax.load(step, wanted)
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(
                f"the checkpoint {folder} cannot be read; remove it, and the run goes on from the "
                f"one before ({error})"
            ) from error
        state: TrainingState = jax.tree.unflatten(
            jax.tree.structure(abstract), [arrays[name] for name in names]
        )
        return state

    def close(self) -> None:
        """Waits until everything is written."""
        self._orbax.close()

    def _check_facts(self, folder: Path, before: Facts) -> None:
        for name in sorted({*before, *self._facts}):
            old, new = before.get(name), self._facts.get(name)
            if name not in self._changeable and old != new:
                raise ConfigError(
                    f"the checkpoint {folder} is of a run with {name}={old}, and this run has "
                    f"{name}={new}; give the same, or another folder for this run"
                )


def _named(state: TrainingState) -> dict[str, Any]:
    """The arrays of a state, or their shapes, by names such as trained.layers.0.q.a."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _kept(array: jax.Array) -> jax.Array:
    """The array, or a copy where the host's view of it is the memory that the next step reuses."""
    is_shared = next(iter(array.devices())).platform == "cpu"
    return jnp.copy(array) if is_shared else array
