"""TrainingConfig: everything about a training run that is not the model, its devices or its data.

The record is made once, of a settings file or of flags, and checks itself; nothing below it sees a
parser. Its fields have the flags' names.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.weight import is_quantized

CHOICES: Mapping[str, tuple[str, ...]] = {
    "objective": ("supervised", "preference"),
    "schedule": ("cosine", "linear", "constant"),
    "optimizer": ("adamw", "adafactor"),
}

# The router's auxiliary loss where a router is trained: the default of transformers' MixtralConfig.
TRAINED_ROUTER_AUX = 0.001

# Fields that may differ when a run goes on: they change what a step costs, not what it computes.
# The sums of more micro-batches are the same up to the rounding of float32.
CHANGEABLE = frozenset(
    {
        *("micro_batches", "recompute", "checkpoint_every", "keep", "validate_every"),
        "max_skipped_steps",
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The settings of a training run. Raises ConfigError for values that cannot be.

    Attributes:
        objective: "supervised" learns the targets of texts and chats; "preference" learns by pairs
            of answers, of which one is preferred (DPO, arXiv:2305.18290).
        adapter: the low-rank matrices to train beside a model that stays as it is; None trains all
            parameters of the model.
        learning_rate: the largest one, after the warmup.
        schedule: what follows the warmup: "cosine" or "linear" falls to `final_share` of
            `learning_rate` at the last step, "constant" stays.
        warmup_steps: steps over which the learning rate rises from 0.
        final_share: share of `learning_rate` at the end.
        optimizer: "adamw" (arXiv:1711.05101), or "adafactor" (arXiv:1804.04235, without relative
            steps), whose moments of a matrix take a row and a column.
        weight_decay: decoupled; vectors, which are norms, do not decay.
        beta1: decay of adamw's first moment.
        beta2: decay of adamw's second moment.
        epsilon: what adamw adds to the root of the second moment.
        max_grad_norm: gradients of a larger global norm are scaled down to it; None never does.
        steps: number of optimiser steps; None where `epochs` says it.
        epochs: how often all rows are read; None where `steps` says it.
        rows: rows of a step, over all devices and micro-batches; pairs for "preference".
        micro_batches: parts that a step's rows are computed in, one behind the other, for less
            memory and the same gradient.
        length: positions of a row, into which documents are packed.
        seed: fixes the new adapter, the order of the data, and everything else that is drawn.
        router_aux_coefficient: weight of the load balancing loss of routers; None is 0.001 where
            routers are trained, and 0 where they are not.
        router_z_coefficient: weight of the mean square of the routers' log-normalisers
            (arXiv:2202.08906), which keeps their logits small.
        beta: of "preference", how much a policy may differ from the model without the adapter.
        recompute: the backward pass computes each layer again instead of keeping what is inside.
        checkpoint_every: steps between two checkpoints.
        keep: number of checkpoints that are kept.
        validate_every: steps between two validations; 0 never validates.
        max_skipped_steps: so many steps in a row whose loss or gradient is not finite end the run.
    """

    objective: str = "supervised"
    adapter: AdapterConfig | None = field(default_factory=AdapterConfig)
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_share: float = 0.1
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    steps: int | None = None
    epochs: float | None = None
    rows: int = 8
    micro_batches: int = 1
    length: int = 2048
    seed: int = 0
    router_aux_coefficient: float | None = None
    router_z_coefficient: float = 0.0
    beta: float = 0.1
    recompute: bool = True
    checkpoint_every: int = 100
    keep: int = 3
    validate_every: int = 0
    max_skipped_steps: int = 10

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("give the length of the run as either steps or epochs, not as both")
        if self.rows % self.micro_batches:
            raise ConfigError(
                f"rows={self.rows} of a step cannot be computed in "
                f"micro_batches={self.micro_batches} of one size; choose a divisor of {self.rows}"
            )
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} leaves no step of {self.steps} at the full "
                "learning rate; give fewer"
            )
        if self.objective == "preference" and self.adapter is None:
            raise ConfigError(
                "objective=preference compares an adapter with the model without it; full "
                "fine-tuning has no such model: give an adapter"
            )

    def _check_choices(self) -> None:
        for name, values in CHOICES.items():
            value = getattr(self, name)
            if value not in values:
                raise ConfigError(f"{name}={value!r} does not exist; use {' or '.join(values)}")

    def _check_numbers(self) -> None:
        whole = ("rows", "micro_batches", "length", "checkpoint_every", "keep", "max_skipped_steps")
        for name in whole:
            _check_whole(name, getattr(self, name), 1)
        for name in ("warmup_steps", "validate_every", "seed"):
            _check_whole(name, getattr(self, name), 0)
        if self.steps is not None:
            _check_whole("steps", self.steps, 1)
        if self.length < 2:
            raise ConfigError("length=1 has no token to predict; give 2 or more")
        for name in ("learning_rate", "epsilon", "beta", "epochs", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (_is_finite(value) and value > 0):
                raise ConfigError(f"{name}={value!r} must be a number above 0")
        for name in ("weight_decay", "router_z_coefficient", "router_aux_coefficient"):
            value = getattr(self, name)
            if value is not None and not (_is_finite(value) and value >= 0):
                raise ConfigError(f"{name}={value!r} must be a number from 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not (_is_finite(value) and 0 <= value < 1):
                raise ConfigError(f"{name}={value!r} must be from 0 and below 1")
        if not (_is_finite(self.final_share) and 0 <= self.final_share <= 1):
            raise ConfigError(f"final_share={self.final_share!r} must be from 0 to 1")

    def check(self, model: ModelConfig, dtype: str) -> None:
        """Raises ConfigError for what a model of this config and dtype cannot be trained with."""
        if self.adapter is not None:
            self.adapter.check(model)
        elif is_quantized(dtype):
            raise ConfigError(
                f"the weights are {dtype}, which full fine-tuning cannot change by small steps; "
                "train an adapter, or give --dtype bfloat16"
            )
        if not model.is_moe and (self.router_aux_coefficient or self.router_z_coefficient):
            raise ConfigError(
                "this model has no routers; leave out router_aux_coefficient and "
                "router_z_coefficient"
            )
        if self.length > model.max_context:
            raise ConfigError(
                f"length={self.length} is more than the {model.max_context} positions of this "
                "model; give less"
            )

    def aux_coefficient(self, model: ModelConfig) -> float:
        """The weight of the load balancing loss for this model."""
        if self.router_aux_coefficient is not None:
            return self.router_aux_coefficient
        is_trained = self.adapter is None or "router" in self.adapter.targets
        return TRAINED_ROUTER_AUX if model.is_moe and is_trained else 0.0

    def resolved(self, steps_of_an_epoch: int) -> "TrainingConfig":
        """The same with `steps` in place of `epochs`, for data of so many steps.

        Raises ConfigError where the warmup leaves none of them.
        """
        if self.epochs is None:
            return self
        return replace(self, steps=math.ceil(self.epochs * steps_of_an_epoch), epochs=None)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values, those of the adapter in an object of their own."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainingConfig":
        """Makes a config of the output of `to_json`; raises ConfigError for unknown fields."""
        _check_names(cls, values)
        adapter = values.get("adapter", {})
        if adapter is None:
            return cls(**values)
        _check_names(AdapterConfig, adapter)
        settings = {**adapter}
        if "targets" in settings:
            settings["targets"] = tuple(settings["targets"])
        return cls(**{**values, "adapter": AdapterConfig(**settings)})


def _check_names(record: type, values: Mapping[str, Any]) -> None:
    known = [entry.name for entry in fields(record)]
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(
            f"{unknown[0]!r} is no setting of a training run; choose from {', '.join(known)}"
        )


def _check_whole(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
