"""Pages and attended tokens of one sequence, by hand."""

import pytest

from mixtral_jax.errors import ConfigError
from mixtral_jax.planning.search import known_model
from mixtral_jax.roofline.workload import unsplit_placement
from tests.support.plan_workload import SMALL, workload_of


def test_a_window_bounds_the_pages() -> None:
    config = known_model("mistral-7b-instruct-v0.1")
    workload = workload_of(config, "bfloat16", batch=1, context=32_768)
    assert (workload.pages_per_sequence, workload.attended_tokens) == (257, 4096)


def test_without_a_window_every_token_has_a_place() -> None:
    workload = workload_of(SMALL, context=250, page_size=64)
    assert (workload.pages_per_sequence, workload.attended_tokens) == (4, 250)


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="longer than the model's 32768"):
        workload_of(SMALL, context=32_769)


@pytest.mark.parametrize("name", ["batch", "context", "prefill_tokens", "page_size"])
def test_nothing_is_less_than_one(name: str) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        workload_of(SMALL, **{name: 0})


@pytest.mark.parametrize(
    ("dtype", "platform", "activations", "page_size"),
    [
        ("int8", "cpu", "float32", 16),
        ("int8", "tpu", "bfloat16", 128),
        ("int8", "gpu", "bfloat16", 64),
        ("float32", "tpu", "float32", 128),
        ("bfloat16", "cpu", "bfloat16", 16),
    ],
)
def test_a_platform_decides_activations_and_pages(
    dtype: str, platform: str, activations: str, page_size: int
) -> None:
    placement = unsplit_placement(dtype, platform)
    assert (placement.activation_dtype, placement.page_size) == (activations, page_size)
    assert placement.layout is None
