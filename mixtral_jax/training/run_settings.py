"""RunSettings: all that a run of `mixtral-jax train` needs to know, from a settings file and flags.

The names of settings are the fields of RunSettings and of TrainingConfig side by side, and those of
AdapterConfig under `adapter`:

    model: checkpoints/mixtral-8x7b-instruct
    data: [chats.jsonl, "rare.jsonl:3"]
    output: runs/first
    epochs: 2
    learning_rate: 2e-4
    adapter: {rank: 16, targets: [q, k, v, o]}
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from mixtral_jax.errors import ConfigError
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.training.config import TrainingConfig
from mixtral_jax.training.dataset import BadRows, LongRows, Source

_TRAINING, _ADAPTER, _TARGETS = "training", "adapter", "targets"

_VALIDATE_EVERY = 50  # steps, where rows to validate on are given and no interval is


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of a run.

    Attributes:
        model: folder of the checkpoint, or "tiny-random".
        data: files of rows to train on.
        validation: files of rows whose loss is told, and that are not trained on.
        output: folder of the run: adapter, checkpoints and logs.
        base: name under which others find the model, written into the adapter; None for the name
            in the checkpoint.
        bad_rows: treatment of rows that cannot be trained on.
        long_rows: treatment of examples that are longer than `length`.
        ignored_keys: keys of rows that mean nothing.
        mesh: devices that the model is split over, as for `serve`.
        dtype: float32 or bfloat16; None keeps the stored one.
        samples: number of validation rows that are answered at each validation and at the end.
        training: everything else.
    """

    model: str
    data: tuple[Source, ...]
    output: Path
    training: TrainingConfig
    validation: tuple[Source, ...] = ()
    base: str | None = None
    bad_rows: BadRows = BadRows.REFUSE
    long_rows: LongRows = LongRows.REFUSE
    ignored_keys: tuple[str, ...] = ()
    mesh: str = "auto"
    dtype: str | None = None
    samples: int = 3

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("there is no data: give --data FILE.jsonl")
        if self.training.validate_every and not self.validation:
            raise ConfigError("validate_every needs rows to validate on: give --validation FILE")
        if type(self.samples) is not int or self.samples < 0:
            raise ConfigError(f"samples={self.samples!r} must be a whole number of at least 0")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "RunSettings":
        """Makes the settings of plain values; those that are not given have their defaults.

        Without steps and epochs, the data is read once. Raises ConfigError that names what is wrong
        and, for an unknown name, the nearest known one.
        """
        values = {**values}
        own = {field.name for field in fields(cls)} - {_TRAINING}
        inner = {field.name for field in fields(TrainingConfig)}
        check_names(values, own | inner, "a run")
        for name in ("model", "data", "output"):
            if values.get(name) in (None, "", [], ()):
                raise ConfigError(f"{name} is missing: give --{name}, or name it in the settings")
        training = {name: values.pop(name) for name in [*values] if name in inner}
        if values.get("validation") and training.get("validate_every") is None:
            training["validate_every"] = _VALIDATE_EVERY
        if training.get("steps") is None and training.get("epochs") is None:
            training["epochs"] = 1.0
        made: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        for name in ("data", "validation"):
            made[name] = tuple(Source.parse(text) for text in texts(name, made.get(name, ())))
        made["ignored_keys"] = texts("ignored_keys", made.get("ignored_keys", ()))
        for name in ("model", "output", "base", "mesh", "dtype"):
            if name in made and not isinstance(made[name], str):
                raise ConfigError(f"{name}={made[name]!r} must be text")
        made["output"] = Path(made["output"])
        for name, kind in (("bad_rows", BadRows), ("long_rows", LongRows)):
            if name in made:
                made[name] = _choice(name, made[name], kind)
        return cls(**made, training=_training(training))


def _training(values: Mapping[str, Any]) -> TrainingConfig:
    adapter = values.get(_ADAPTER, {})
    made = _plain(TrainingConfig, {name: v for name, v in values.items() if name != _ADAPTER})
    if adapter is None:  # full fine-tuning
        return TrainingConfig(**made, adapter=None)
    if not isinstance(adapter, Mapping):
        raise ConfigError(f"adapter={adapter!r} must be settings such as {{rank: 16}}, or null")
    check_names(adapter, {field.name for field in fields(AdapterConfig)}, "an adapter")
    settings = _plain(AdapterConfig, {name: v for name, v in adapter.items() if name != _TARGETS})
    if adapter.get(_TARGETS) is not None:
        settings[_TARGETS] = texts(_TARGETS, adapter[_TARGETS])
    return TrainingConfig(**made, adapter=AdapterConfig(**settings))


def _plain(record: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values of the types that a record's fields have, without those that are not given.

    YAML takes 2e-4, which has no point, for text. Raises ConfigError for another type.
    """
    made: dict[str, Any] = {}
    for field in fields(record):
        if field.name not in values:
            continue
        value = values[field.name]
        kinds = get_args(field.type) or (field.type,)
        if value is None:
            if type(None) in kinds:
                made[field.name] = None
            continue  # without a value, the default stands
        if float in kinds:
            value = _number(value)
        if type(value) not in kinds:
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
            wanted = " or ".join(names[kind] for kind in kinds if kind in names)
            raise ConfigError(f"{field.name}={values[field.name]!r} must be {wanted}")
        made[field.name] = value
    return made


def _number(value: object) -> object:
    """Returns a whole number, or text that spells a number, as a float; all else as it is."""
    if type(value) is int or isinstance(value, str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    return value


def texts(name: str, value: object) -> tuple[str, ...]:
    """Returns a list of texts, or a single text as a list. Raises ConfigError naming `name`."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{name}={value!r} must be a list of texts")
    return tuple(value)


def check_names(values: Mapping[str, Any], known: set[str], what: str) -> None:
    """Raises ConfigError for a name that is not known, with the nearest one that is."""
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {sorted(known)}"
            raise ConfigError(f"{name!r} is no setting of {what}{hint}")


def _choice(name: str, value: object, kind: type[BadRows] | type[LongRows]) -> BadRows | LongRows:
    try:
        return kind(str(value))
    except ValueError:
        raise ConfigError(f"{name}={value!r} does not exist; use {' or '.join(kind)}") from None
