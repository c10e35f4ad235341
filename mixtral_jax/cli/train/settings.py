"""The settings of a run: a YAML file, and flags that take the place of what it says."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_jax.errors import ConfigError

if TYPE_CHECKING:
    from mixtral_jax.training.run_settings import RunSettings

_ADAPTER = "adapter"
# Flags of an adapter's settings, which the file has under `adapter`.
_ADAPTER_FLAGS = ("rank", "alpha", "targets")


def read_settings(
    file: Path | None, flags: Mapping[str, Any], changes: Sequence[str], *, is_full: bool
) -> "RunSettings":
    """Returns the settings of a run. Raises ConfigError for what is wrong.

    Args:
        file: YAML; None for none.
        flags: by the names of settings; those that are None were not given.
        changes: texts NAME=VALUE, where an adapter's settings are named such as adapter.rank.
        is_full: trains all parameters, and no adapter.
    """
    from mixtral_jax.training.run_settings import RunSettings

    values = {} if file is None else _read(file)
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {change}: give NAME=VALUE, such as --set weight_decay=0.1")
        given[name] = _parsed(text, f"--set {change}")
    adapter = values.get(_ADAPTER, {})
    for name in [*given]:
        inner = name.removeprefix(f"{_ADAPTER}.")
        if name in _ADAPTER_FLAGS or inner != name:
            if adapter is None or is_full:
                raise ConfigError(f"{name} is of an adapter, which full fine-tuning does not train")
            if not isinstance(adapter, Mapping):
                raise ConfigError(f"adapter={adapter!r} must be settings such as {{rank: 16}}")
            adapter = {**adapter, inner: given.pop(name)}
    if _ADAPTER in values or adapter:
        values[_ADAPTER] = adapter
    if is_full:
        values[_ADAPTER] = None
    # A run's length is either of the two: a flag takes the place of the other one in the file.
    if ("steps" in given) != ("epochs" in given):
        values.pop("steps", None)
        values.pop("epochs", None)
    return RunSettings.of({**values, **given})


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings {file}: {error}") from None
    values = _parsed(text, str(file))
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is no settings file: give lines such as learning_rate: 2e-4")
    return values


def _parsed(text: str, place: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{place} is no YAML: {' '.join(str(error).split())[:300]}") from None
