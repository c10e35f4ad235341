"""Expected maxima over chips, against cases that can be counted by hand and against a sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import kernels_for
from mixtral_jax.model.expert_load import (
    busiest_experts,
    busiest_pairs,
    computes_every_expert,
    distinct_experts,
)


def test_distinct_experts_of_two_tokens() -> None:
    """The second token's pair of 8 shares 0, 1 or 2 experts with the first's: 15, 12, 1 of 28."""
    probabilities = distinct_experts(2, experts=8, chosen=2)
    np.testing.assert_allclose(probabilities, [0, 0, 1 / 28, 12 / 28, 15 / 28, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("tokens", "chips", "replicas", "experts"),
    [
        (1, 1, 1, 2),  # a chip with all experts reads the two that were chosen
        (1, 8, 1, 1),  # with one expert on every chip, the busiest reads its own
        (1, 4, 1, 8 / 7),  # the second expert is the chip's other one in 1 of 7 cases
        (1, 2, 1, 10 / 7),  # it is on the same chip, of four experts, in 3 of 7 cases
        (1, 4, 2, 2 - (6 / 7) ** 2),  # both replicas must spread their pairs
        (2, 1, 1, 2 * (1 / 28) + 3 * (12 / 28) + 4 * (15 / 28)),
        (1000, 4, 1, 2),  # many tokens need every expert
    ],
)
def test_busiest_experts_by_hand(tokens: int, chips: int, replicas: int, experts: float) -> None:
    assert busiest_experts(tokens, 8, 2, chips, replicas) == pytest.approx(experts)


def test_busiest_experts_and_pairs_against_a_sample() -> None:
    """Six tokens, experts in four pairs, two replicas; 4,000 draws of a fixed seed."""
    tokens, chips, replicas, draws = 6, 4, 2, 4000
    rng = np.random.default_rng(0)
    choices = rng.random((draws, replicas, tokens, 8)).argsort(axis=-1)[..., :2]
    counts = np.zeros((draws, replicas, 8))
    for expert in range(8):
        counts[..., expert] = (choices == expert).sum(axis=(2, 3))
    of_chips = counts.reshape(draws, replicas, chips, 2)
    experts = (of_chips > 0).sum(axis=-1).max(axis=(1, 2)).mean()
    pairs = of_chips.sum(axis=-1).max(axis=(1, 2)).mean()
    assert busiest_experts(tokens, 8, 2, chips, replicas) == pytest.approx(experts, abs=0.02)
    # The normal distribution is an approximation.
    assert busiest_pairs(tokens, 8, 2, chips, replicas) == pytest.approx(pairs, rel=0.05)


@pytest.mark.parametrize(
    ("tokens", "gathered", "is_dense"),
    [
        (8, 8, False),  # 1 - 0.75**8 = 0.90
        (8, 64, False),  # the other seven groups may have no token
        (11, 11, True),  # 0.958
        (128, 128, True),
        (64, 512, False),  # computes for longer than it reads
    ],
)
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_an_accelerator_reads_all_experts_where_nearly_all_are_chosen(
    tokens: int, gathered: int, is_dense: bool, platform: str
) -> None:
    kernels, weight = kernels_for(platform), jax.ShapeDtypeStruct((8, 256, 128), jnp.bfloat16)
    assert computes_every_expert(tokens, gathered, 8, 2, weight, kernels) == is_dense
    assert not computes_every_expert(tokens, gathered, 8, 2, weight, kernels_for("cpu"))


def test_weights_that_a_kernel_reads_without_rows_are_read_anyway() -> None:
    """Those of fp8 on an A100, which XLA widens whole; others' kernels widen what they fetch."""
    weight = jax.ShapeDtypeStruct((8, 256, 128), jnp.float8_e4m3fn)
    assert computes_every_expert(1, 1, 8, 2, weight, kernels_for("gpu", capability=(8, 0)))
    assert not computes_every_expert(1, 1, 8, 2, weight, kernels_for("gpu", capability=(8, 9)))
    assert not computes_every_expert(1, 1, 8, 2, weight, kernels_for("tpu"))


def test_one_chip_computes_every_pair() -> None:
    assert busiest_pairs(5, 8, 2, chips=1, replicas=1) == 10


def test_a_chip_with_one_expert_computes_each_token_once_at_most() -> None:
    assert busiest_pairs(1, 8, 2, chips=8, replicas=100) == 1


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_int4_takes_the_grouped_product_that_reads_it_as_it_lies(platform: str) -> None:
    """The dense form would widen it in memory, so it is for matrices that no kernel takes."""
    if platform == "gpu" and jax.__version_info__ >= (0, 12):
        pytest.skip("there experts of many rows are widened anyway")
    kernels = kernels_for(platform)
    whole = jax.ShapeDtypeStruct((8, 512, 128), jnp.uint8)
    thin = jax.ShapeDtypeStruct((8, 500, 128), jnp.uint8)
    assert not computes_every_expert(64, 64, 8, 2, whole, kernels)
    assert computes_every_expert(64, 64, 8, 2, thin, kernels)
