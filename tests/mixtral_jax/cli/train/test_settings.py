"""Flags take the place of what the settings file says."""

from pathlib import Path

import pytest

from mixtral_jax.cli.train.settings import read_settings
from mixtral_jax.errors import ConfigError
from mixtral_jax.model.adapter import AdapterConfig

YAML = """
model: m
data: [a.jsonl]
output: out
epochs: 2
learning_rate: 2e-4
adapter: {rank: 4, targets: [q, v]}
"""


def file_of(folder: Path, text: str = YAML) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    settings = read_settings(file_of(tmp_path), {}, [], is_full=False)
    assert settings.training.epochs == 2
    assert settings.training.learning_rate == 2e-4
    assert settings.training.adapter == AdapterConfig(rank=4, targets=("q", "v"))


def test_flags_and_changes_win(tmp_path: Path) -> None:
    flags = {"steps": 9, "rank": 2, "model": None}
    changes = ["adapter.alpha=3", "weight_decay=1e-2", "max_grad_norm=null"]
    settings = read_settings(file_of(tmp_path), flags, changes, is_full=False)
    assert (settings.model, settings.training.steps, settings.training.epochs) == ("m", 9, None)
    assert settings.training.adapter == AdapterConfig(rank=2, alpha=3.0, targets=("q", "v"))
    assert settings.training.weight_decay == 0.01
    assert settings.training.max_grad_norm is None


def test_full_fine_tuning_has_no_adapter(tmp_path: Path) -> None:
    assert read_settings(file_of(tmp_path), {}, [], is_full=True).training.adapter is None
    with pytest.raises(ConfigError, match="rank is of an adapter"):
        read_settings(file_of(tmp_path), {"rank": 4}, [], is_full=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "is no YAML"),
        ("- a", "is no settings file"),
        (YAML + "ephocs: 2", "'ephocs' is no setting of a run; did you mean 'epochs'"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_settings(file_of(tmp_path, text), {}, [], is_full=False)


def test_a_missing_file_and_a_wrong_change_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the settings"):
        read_settings(tmp_path / "gone.yaml", {}, [], is_full=False)
    with pytest.raises(ConfigError, match="give NAME=VALUE"):
        read_settings(None, {}, ["steps"], is_full=False)
