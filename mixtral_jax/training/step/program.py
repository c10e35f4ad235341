"""The training step, compiled for a shape of rows: on devices that are here, or that are not.

What `mixtral-jax train` prints before it starts, and what `train --plan` prints for chips that are
elsewhere, is read off this program.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax.errors import ConfigError
from mixtral_jax.layout import Layout
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.training.batch import Batch, PreferenceBatch
from mixtral_jax.training.config import TrainingConfig
from mixtral_jax.training.step.trainee import Trained, Trainee
from mixtral_jax.training.step.training_step import (
    Evaluation,
    Rows,
    StepMetrics,
    TrainingState,
    TrainingStep,
)


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on one device.

    Attributes:
        state_bytes: trained arrays, their moments and counters.
        frozen_bytes: parameters that are not trained.
        temporary_bytes: the largest amount that exists beside them at any moment of a step.
        program_bytes: the compiled program.
    """

    state_bytes: int
    frozen_bytes: int
    temporary_bytes: int
    program_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum of all."""
        parts = (self.state_bytes, self.frozen_bytes, self.temporary_bytes, self.program_bytes)
        return sum(parts)


class TrainingProgram:
    """A compiled training step.

    Args:
        model: the model to train, with its weights or abstract.
        config: settings, in which `steps` is known.
        options: of the compiler, by the names that `jax.stages.Lowered.compile` takes.

    Raises ConfigError for a model or devices that do not fit the settings.
    """

    def __init__(
        self,
        model: Transformer,
        config: TrainingConfig,
        options: Mapping[str, bool | int | float | str] | None = None,
    ) -> None:
        self.config = config
        self.trainee = Trainee(model, config.adapter)
        self.step = TrainingStep(self.trainee, config)
        self._check_rows()
        self._state_shardings = self._shardings_of_state()
        self._compiled = self._lowered(model).compile(None if options is None else {**options})
        self._evaluate = jax.jit(self.step.evaluate, out_shardings=self._everywhere)

    @property
    def layout(self) -> Layout | None:
        """The mesh and the rules on it; None for one device."""
        return self.trainee.layout

    def start(self, model: Transformer, key: jax.Array) -> TrainingState:
        """The state before the first step.

        In full fine-tuning it holds copies of the model's parameters, which the caller should drop
        then.
        """
        trained = self.trainee.initial(model, key)
        begin = jax.jit(self.step.initial_state, out_shardings=self._state_shardings)
        state: TrainingState = begin(trained)
        return state

    def frozen(self, model: Transformer) -> Any:
        """The parameters that are not trained, as the step takes them."""
        return self.trainee.frozen(model)

    def abstract_state(self) -> TrainingState:
        """Shapes and shardings of the state."""
        shapes = jax.eval_shape(self.step.initial_state, self.trainee.abstract())
        if self._state_shardings is None:
            return shapes
        return jax.tree.map(_with_sharding, shapes, self._state_shardings)

    def __call__(
        self, state: TrainingState, frozen: Any, batch: Rows
    ) -> tuple[TrainingState, StepMetrics]:
        """Computes a step; the state that is given is used up.

        Args:
            state: of `start`, or of the step before.
            frozen: the parameters that are not trained.
            batch: arrays of the host, of all rows of the step; the same in every process.
        """
        after: tuple[TrainingState, StepMetrics] = self._compiled(
            state, frozen, placed(batch, self.layout)
        )
        return after

    def evaluate(self, trained: Trained, frozen: Any, batch: Rows) -> Evaluation:
        """The sums over some rows, without a gradient."""
        sums: Evaluation = self._evaluate(trained, frozen, placed(batch, self.layout))
        return sums

    @property
    def memory(self) -> TrainingMemory:
        """Bytes on one device, as the compiler lays arrays out."""
        analysis = self._compiled.memory_analysis()
        state = bytes_on_device(self.abstract_state())
        frozen = 0
        if self.config.adapter is not None:
            frozen = analysis.argument_size_in_bytes - state - self._batch_bytes()
        return TrainingMemory(
            state_bytes=state,
            frozen_bytes=frozen,
            temporary_bytes=analysis.temp_size_in_bytes + self._batch_bytes(),
            program_bytes=analysis.generated_code_size_in_bytes,
        )

    @property
    def cost_of_one_pass(self) -> float | None:
        """Operations on one device as the compiler counts them, the body of each loop once; None
        where it does not count. See `step_flops` for those of a step.
        """
        cost = self._compiled.cost_analysis()
        return None if not cost or "flops" not in cost else float(cost["flops"])

    def text(self) -> str:
        """The compiled program as HLO."""
        text: str = self._compiled.as_text()
        return text

    def _batch_bytes(self) -> int:
        return bytes_on_device(abstract_batch(self.config, self.layout))

    @property
    def _everywhere(self) -> NamedSharding | None:
        if self.layout is None:
            return None
        return NamedSharding(self.layout.mesh, PartitionSpec())

    def _lowered(self, model: Transformer) -> Any:
        frozen = jax.tree.map(_abstract, self.trainee.frozen(model))
        shardings = None if self.layout is None else (self._state_shardings, self._everywhere)
        step: Callable[..., Any] = self.step
        jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
        batch = abstract_batch(self.config, self.layout)
        return jitted.lower(self.abstract_state(), frozen, batch)

    def _check_rows(self) -> None:
        groups = 1 if self.layout is None else self.layout.num_sequence_groups
        size = self.config.rows // self.config.micro_batches
        if size % groups:
            raise ConfigError(
                f"{size} rows of a micro-batch cannot be split over {groups} groups of devices; "
                f"give rows of a multiple of {groups * self.config.micro_batches}"
            )

    def _shardings_of_state(self) -> TrainingState | None:
        """Moments lie where the arrays lie whose shape they have; all else is everywhere."""
        if self.layout is None:
            return None
        everywhere = self._everywhere
        trained = self.trainee.abstract()
        moments = jax.eval_shape(self.step.optimizer.init, trained)

        def of_moment(moment: Any, array: Any) -> Any:
            return array.sharding if moment.shape == array.shape else everywhere

        return TrainingState(
            trained=jax.tree.map(lambda array: array.sharding, trained),
            moments=optax.tree.map_params(
                self.step.optimizer,
                of_moment,
                moments,
                trained,
                transform_non_params=lambda _: everywhere,
            ),
            step=everywhere,  # type: ignore[arg-type]
            skipped=everywhere,  # type: ignore[arg-type]
            skipped_in_a_row=everywhere,  # type: ignore[arg-type]
        )


def abstract_batch(config: TrainingConfig, layout: Layout | None) -> Rows:
    """Shapes and shardings of the rows of a step."""
    sharding = None if layout is None else layout.sharding("BT")
    shape = (config.rows, config.length)

    def array(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows = Batch(array(jnp.int32), array(jnp.int32), array(jnp.float32), array(jnp.int32))
    return PreferenceBatch(rows, rows) if config.objective == "preference" else rows


def placed(batch: Rows, layout: Layout | None) -> Rows:
    """The rows on the devices; each process passes all of them and places its own."""
    if layout is None:
        return jax.tree.map(jnp.asarray, batch)
    sharding = layout.sharding("BT")

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, batch)


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    sharding = array.sharding if isinstance(array, (jax.Array, jax.ShapeDtypeStruct)) else None
    if sharding is not None and not isinstance(sharding, NamedSharding):
        sharding = None  # the only device
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _with_sharding(shape: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def bytes_on_device(shapes: Any) -> int:
    """Bytes that a tree of shapes with shardings takes on one device."""
    total = 0
    for shape in jax.tree.leaves(shapes):
        held = shape.shape if shape.sharding is None else shape.sharding.shard_shape(shape.shape)
        total += int(np.prod(held, dtype=np.int64)) * shape.dtype.itemsize
    return total
