"""A served model's name and provider follow from its path."""

from typing import Any

import pytest

from convert.served_name import served_as
from mixtral_jax.hf_config import from_hf
from tests.support import sources

DENSE = from_hf(sources.DENSE)


MOE = from_hf(sources.MOE)


@pytest.mark.parametrize(
    "path, name, provider",
    [
        ("Mistral-7B-Instruct-v0.1", "mistralai-Mistral-7B-Instruct-v01", "MistralAI"),
        ("Mixtral-8x22B-Instruct-v0.1", "mistralai-Mixtral-8x22B-Instruct-v0-1", "MistralAI"),
        (
            "hub/models--mistralai--Mixtral-8x7B-v0.1/snapshots/abc",
            "mistralai-Mixtral-8x7B-v01",
            "MistralAI",
        ),
        ("mistral-7b-instruct-v0.2.Q4_K_M.gguf", "mistralai-Mistral-7B-Instruct-v02", "MistralAI"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct", "HuggingFaceTB"),
        ("tuned/model.safetensors", "tuned", "unknown"),
        ("my.model-v1.5", "my.model-v1.5", "unknown"),
    ],
)
def test_what_a_model_is_served_as(tmp_path: Any, path: str, name: str, provider: str) -> None:
    place = tmp_path / path
    if place.suffix in (".gguf", ".safetensors"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    else:
        place.mkdir(parents=True)
    assert served_as(place) == (name, provider)
