"""Values that a model's page recommends, in the checkpoint where its files name none."""

import json
from pathlib import Path
from typing import Any

import pytest

from convert.recommended_sampling import add_recommended
from mixtral_jax.checkpoint.sampling_defaults import read_sampling_defaults

SMOLLM2 = {"temperature": 0.2, "top_p": 0.9}
EMBEDDED = {"temperature": 0.2, "top_p": 0.5}


@pytest.mark.parametrize(
    ("name", "content", "defaults"),
    [
        ("SmolLM2-135M-Instruct", None, SMOLLM2),
        ("SmolLM2-135M-Instruct.Q8_0", None, SMOLLM2),
        ("SmolLM2-135M-Instruct.Q4_1", None, EMBEDDED),
        ("smollm2-1.7b-instruct", {"eos_token_id": [2]}, SMOLLM2),
        ("SmolLM2-135M-Instruct", {"top_k": 5}, {"top_k": 5}),
        ("SmolLM2-135M", None, {}),
        ("Mixtral-8x7B-Instruct-v0.1", {"eos_token_id": 2}, {}),
    ],
)
def test_known_models_get_them_where_their_files_name_none(
    name: str, content: dict[str, Any] | None, defaults: dict[str, float], tmp_path: Path
) -> None:
    file = tmp_path / "generation_config.json"
    if content is not None:
        file.write_text(json.dumps(content), encoding="utf-8")
        file.chmod(0o444)
    add_recommended(tmp_path, name)
    assert read_sampling_defaults(tmp_path) == defaults
    assert not defaults or json.loads(file.read_text(encoding="utf-8")) == {
        **(content or {}),
        **defaults,
    }


def test_the_embedded_model_has_them(smollm2: Path) -> None:
    assert read_sampling_defaults(smollm2) == EMBEDDED
