"""Settings of a run: what is not given has a default, and what is wrong is named."""

from pathlib import Path

import pytest

from mixtral_jax.errors import ConfigError
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.training.config import TrainingConfig
from mixtral_jax.training.dataset import BadRows, LongRows, Source
from mixtral_jax.training.run_settings import RunSettings

LEAST = {"model": "m", "data": "a.jsonl", "output": "out"}


def test_the_least_settings_read_the_data_once() -> None:
    assert RunSettings.of(LEAST) == RunSettings(
        model="m",
        data=(Source(Path("a.jsonl")),),
        output=Path("out"),
        training=TrainingConfig(epochs=1.0),
    )


def test_settings_of_all_kinds() -> None:
    settings = RunSettings.of(
        LEAST
        | {
            "data": ["a.jsonl:2", "b.jsonl"],
            "validation": ["c.jsonl"],
            "bad_rows": "drop",
            "long_rows": "truncate",
            "ignored_keys": ["id"],
            "learning_rate": "2e-4",  # YAML takes it for text
            "max_grad_norm": None,
            "steps": 7,
            "validate_every": 5,
            "adapter": {"rank": 4, "alpha": "8e0", "targets": ["v", "q"]},
        }
    )
    assert settings.data == (Source(Path("a.jsonl"), 2), Source(Path("b.jsonl")))
    assert (settings.bad_rows, settings.long_rows) == (BadRows.DROP, LongRows.TRUNCATE)
    assert settings.training == TrainingConfig(
        learning_rate=2e-4,
        max_grad_norm=None,
        steps=7,
        validate_every=5,
        adapter=AdapterConfig(rank=4, alpha=8.0, targets=("q", "v")),
    )
    assert RunSettings.of(LEAST | {"adapter": None}).training.adapter is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"learning_rat": 1},
            "'learning_rat' is no setting of a run; did you mean 'learning_rate'",
        ),
        ({"adapter": {"ranks": 1}}, "no setting of an adapter; did you mean 'rank'"),
        ({"adapter": 3}, "adapter=3 must be settings"),
        ({"adapter": {"rank": "4"}}, "rank='4' must be a whole number"),
        ({"adapter": {"alpha": True}}, "alpha=True must be a number"),
        ({"adapter": {"targets": ["w1"]}}, "'w1' is no target"),
        ({"learning_rate": "much"}, "learning_rate='much' must be a number"),
        ({"learning_rate": [1]}, r"learning_rate=\[1\] must be a number"),
        ({"rows": 2.5}, "rows=2.5 must be a whole number"),
        ({"recompute": 1}, "recompute=1 must be true or false"),
        ({"data": None}, "data is missing: give --data"),
        ({"data": 3}, "data=3 must be a list of texts"),
        ({"model": 3}, "model=3 must be text"),
        ({"bad_rows": "keep"}, "bad_rows='keep' does not exist; use refuse or drop"),
        ({"steps": 3, "epochs": 2.0}, "either steps or epochs"),
        ({"validate_every": 3}, "give --validation FILE"),
        ({"objective": "preference", "adapter": None}, "give an adapter"),
        ({"samples": -1}, "samples=-1"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        RunSettings.of(LEAST | changes)
