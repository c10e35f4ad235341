"""Preparation of an engine: the operator's sizes, and those that are chosen."""

from typing import Any

import pytest

from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.errors import ConfigError
from serving.engine.build import Prepared, prepare
from serving.engine.config import EngineConfig
from serving.flags import SERVICE, defaults, record


def config_of(**given: Any) -> EngineConfig:
    """The record of a command line with these flags."""
    return record(EngineConfig, defaults(SERVICE, model="tiny-random", mesh="data=1", **given))


def prepared(lines: list[str], **given: Any) -> Prepared:
    """The toy, prepared with these flags; `lines` gets what the start says."""
    config = config_of(kv_memory=1, **given)
    return prepare(config, open_pretrained("tiny-random"), lines.append)


@pytest.mark.slow
def test_each_size_is_the_operators_where_a_flag_gives_it() -> None:
    """Buckets beyond the largest step are left out, and that step is always one of them."""
    lines: list[str] = []
    made = prepared(
        lines,
        max_sequences=3,
        max_step_tokens=12,
        step_buckets="3,64",
        page_size=32,
        kv_dtype="float32",
    )
    limits = made.limits
    assert (limits.max_sequences, limits.max_step_tokens, limits.page_size) == (3, 12, 32)
    assert made.max_sequences == 3
    assert sorted(made.steps.rows) == [3, 12]
    assert made.steps.pages.shape[1] == 32 and made.steps.pages.dtype == "float32"
    given = [line for line in lines if line.startswith("--")]
    assert [line.partition(":")[0] for line in given] == [
        "--max-sequences 3",
        "--max-step-tokens 12",
        "--page-size 32",
        "--kv-dtype float32",
        "--step-buckets 3,12",
    ]
    assert [line.partition(": ")[2] for line in given[:4]] == ["given"] * 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"page_size": 24}, "--page-size is 24; give one of 16, 32, 64, 128, 256"),
        ({"step_buckets": "8,4"}, "--step-buckets is '8,4'; give numbers from small to large"),
        ({"step_buckets": "0,4"}, "give numbers from small to large, such as 8,64,512"),
        ({"step_buckets": "many"}, "--step-buckets is 'many'"),
        ({"speculate": "draft"}, "--speculate is 'draft'; give lookup"),
        ({"speculate": "lookup", "max_sequences": 1}, "no row for a guess with --max-sequences 1"),
        ({"max_sequences": 0}, "--max-sequences is 0; it must be at least 1"),
        (
            {"max_sequences": 4, "max_step_tokens": 2},
            "--max-step-tokens is 2 and --max-sequences is 4; .* give --max-step-tokens 4 or more",
        ),
        ({"adapters_folder": "az://bucket/x"}, "--adapters-folder is az://bucket/x, which is no"),
    ],
)
def test_sizes_that_cannot_be_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**given)
