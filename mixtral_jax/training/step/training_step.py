"""The training step: one program that reads the rows of a step and changes the trained arrays.

The gradient is that of the whole step's loss, whatever the number of micro-batches and devices: a
loss is a sum over targets that is divided by the weight of all targets of the step. With
micro-batches, the load balancing loss of routers needs to know how often the whole step picks each
expert before it can be differentiated; a forward pass counts that, where its coefficient is not 0.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mixtral_jax.training.batch import Batch, PreferenceBatch
from mixtral_jax.training.config import TrainingConfig
from mixtral_jax.training.step.objectives import (
    RowSums,
    captures_of,
    divisor,
    num_tokens,
    rows_of,
    sums_of,
)
from mixtral_jax.training.step.optimizer import learning_rate, optimizer
from mixtral_jax.training.step.router_losses import RouterSums
from mixtral_jax.training.step.trainee import Trained, Trainee

Rows = Batch | PreferenceBatch


class TrainingState(NamedTuple):
    """Everything that a step changes. The number of the next step is all that the data needs."""

    trained: Trained
    moments: optax.OptState
    step: jax.Array  # [] i32, optimiser steps that are done, those that were skipped included
    skipped: jax.Array  # [] i32, steps whose loss or gradient was not finite
    skipped_in_a_row: jax.Array  # [] i32, the last ones of them


class StepMetrics(NamedTuple):
    """Figures of one step; scalars are f32."""

    loss: jax.Array  # mean over the weight of targets, without the routers' losses
    aux: jax.Array  # load balancing loss; X if balanced, 0 without routers
    z: jax.Array  # mean square of the routers' log-normalisers
    gradient_norm: jax.Array  # global, before clipping
    learning_rate: jax.Array
    tokens: jax.Array  # positions that are no padding
    targets: jax.Array  # sum of their weights; the number of pairs for "preference"
    accuracy: jax.Array  # of "preference": share of pairs whose margin is above 0
    margin: jax.Array  # of "preference": mean of the margins
    expert_load: jax.Array  # [L E], share of a layer's picks; [0 0] without routers
    is_finite: jax.Array  # bool; the step was skipped where false


class Evaluation(NamedTuple):
    """Sums over some rows; scalars are f32."""

    loss: jax.Array
    targets: jax.Array  # the weight of targets, or the number of pairs, that sums are divided by
    preferred: jax.Array  # pairs whose margin is above 0
    margin: jax.Array


class TrainingStep:
    """The step of one trainee under one config, to be compiled for a shape of rows."""

    def __init__(self, trainee: Trainee, config: TrainingConfig) -> None:
        config.check(trainee.config, trainee.placement.dtype)
        self.trainee, self.config = trainee, config
        self.optimizer = optimizer(config)
        self.aux_coefficient = config.aux_coefficient(trainee.config)

    def initial_state(self, trained: Trained) -> TrainingState:
        """The state before the first step; `trained` may be abstract under `jax.eval_shape`."""
        zero = jnp.zeros((), jnp.int32)
        return TrainingState(trained, self.optimizer.init(trained), zero, zero, zero)

    def __call__(
        self, state: TrainingState, frozen: Any, batch: Rows
    ) -> tuple[TrainingState, StepMetrics]:
        """Computes a step; pure, for `jax.jit` with the state donated."""
        targets, tokens = divisor(batch), num_tokens(batch)
        gradient, sums = self.gradient(state.trained, frozen, batch)
        rate = learning_rate(self.config, state.step)
        norm = optax.tree.norm(gradient)
        loss = sums.loss / targets
        # optax mixes dtypes and ranks inside, which a caller's strict setting would refuse.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, moments = self.optimizer.update(gradient, state.moments, state.trained)
        # A finite gradient makes finite updates. Nothing asks about all updates at once, so that
        # those of one array after the other are made and added.
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        trained = jax.tree.map(lambda p, update: p + rate * update, state.trained, updates)

        def choose(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, old)

        bad = 1 - is_finite.astype(jnp.int32)
        after = TrainingState(
            trained=choose(trained, state.trained),
            moments=choose(moments, state.moments),
            step=state.step + 1,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + bad) * bad,
        )
        zero = jnp.zeros((), jnp.float32)
        router = sums.router
        metrics = StepMetrics(
            loss=loss,
            aux=zero if router is None else router.aux(router.picks, tokens),
            z=zero if router is None else router.z(tokens),
            gradient_norm=norm,
            learning_rate=rate,
            tokens=tokens,
            targets=targets,
            accuracy=sums.preferred / targets,
            margin=sums.margin / targets,
            expert_load=jnp.zeros((0, 0)) if router is None else router.load,
            is_finite=is_finite,
        )
        return after, metrics

    def evaluate(self, trained: Trained, frozen: Any, batch: Rows) -> Evaluation:
        """The sums over some rows, without a gradient."""
        sums = self.sums(trained, frozen, batch)
        return Evaluation(sums.loss, divisor(batch), sums.preferred, sums.margin)

    def gradient(self, trained: Trained, frozen: Any, batch: Rows) -> tuple[Trained, RowSums]:
        """The gradient of the step's loss in float32, and the sums over its rows."""
        count = self.config.micro_batches
        targets, tokens = divisor(batch), num_tokens(batch)
        parts = micro_batches(batch, count)
        picks = None
        if self.aux_coefficient and count > 1:
            picks = self._picks(trained, frozen, parts)

        def loss(trained: Trained, rows: Rows) -> tuple[jax.Array, RowSums]:
            sums = self.sums(trained, frozen, rows)
            total = sums.loss / targets
            if sums.router is not None:
                known = sums.router.picks if picks is None else picks
                total += self.aux_coefficient * sums.router.aux(known, tokens)
                total += self.config.router_z_coefficient * sums.router.z(tokens)
            return total, sums

        def compute(rows: Rows) -> tuple[Trained, RowSums]:
            gradient, sums = jax.grad(loss, has_aux=True)(trained, rows)
            return self.trainee.constrained(gradient), sums

        if count == 1:
            return compute(jax.tree.map(lambda x: x[0], parts))
        return summed(compute, parts)

    def _picks(self, trained: Trained, frozen: Any, parts: Rows) -> jax.Array:
        """Picks of each expert in the whole step [L E], counted by forward passes."""

        def count(batch: Rows) -> jax.Array:
            rows = rows_of(batch)
            model, adapter = self.trainee.assemble(trained, frozen)
            captures = captures_of(model)
            assert captures is not None
            model.hidden(rows.tokens, segments=rows.segments, adapter=adapter, captures=captures)
            return RouterSums.of(captures, rows.segments != 0).picks

        return summed(count, parts)

    def sums(self, trained: Trained, frozen: Any, rows: Rows) -> RowSums:
        """The sums over some rows."""
        model, adapter = self.trainee.assemble(trained, frozen)
        return sums_of(model, adapter, rows, self.config)


def micro_batches(batch: Rows, count: int) -> Rows:
    """The rows in `count` parts, [B ...] -> [count B/count ...]; part m has row m, m + count ...

    Neighbouring rows come into different parts, so that rows that are split over devices in blocks
    stay where they are.
    """

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, batch)


def summed(compute: Any, parts: Rows) -> Any:
    """The sum of `compute(rows)` over the parts, one after the other, in the dtype of each sum."""
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, first))

    def add(total: Any, rows: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, compute(rows)), None

    return jax.lax.scan(add, zeros, parts)[0]
