"""What a generation_config.json says of sampling."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.checkpoint.sampling_defaults import read_sampling_defaults
from mixtral_jax.errors import ConfigError


def write(folder: Path, **content: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("content", "defaults"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "do_sample": False, "max_new_tokens": 9}, {}),
        (
            {"temperature": 0.6, "top_p": 0.95, "do_sample": True},
            {"temperature": 0.6, "top_p": 0.95},
        ),
        ({"temperature": None, "top_k": 50}, {"top_k": 50}),
        (
            {"top_k": -1, "min_p": 0, "repetition_penalty": 1.1},
            {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.1},
        ),
    ],
)
def test_named_values_are_read(
    content: dict[str, Any], defaults: dict[str, float], tmp_path: Path
) -> None:
    assert read_sampling_defaults(write(tmp_path, **content)) == defaults


def test_a_folder_without_the_file_names_none(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == {}
    assert open_pretrained("tiny-random").sampling_defaults == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"temperature": 5}, "temperature is 5; it must be within 0 and 2; correct it"),
        ({"top_k": 2.5}, "top_k is 2.5; give a whole number"),
        ({"top_p": "high"}, "top_p is 'high'"),
    ],
)
def test_a_value_out_of_range_names_file_and_value(
    content: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        read_sampling_defaults(write(tmp_path, **content))
    assert "generation_config.json" in str(raised.value)
    (tmp_path / "generation_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no JSON object"):
        read_sampling_defaults(tmp_path)
