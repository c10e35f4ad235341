"""Distributions with probabilities that can be written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.sampling import SamplingArrays, _nucleus, sample

# Probabilities 0.5, 0.3, 0.15, 0.05 at temperature 1.
LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
DRAWS = 4000


def frequencies(temperature: float, top_p: float) -> np.ndarray:
    rows = SamplingArrays(
        jnp.full(DRAWS, temperature, jnp.float32),
        jnp.full(DRAWS, top_p, jnp.float32),
        jnp.arange(DRAWS, dtype=jnp.int32),
        jnp.zeros(DRAWS, jnp.int32),
    )
    drawn = sample(jnp.tile(jnp.asarray(LOGITS), (DRAWS, 1)), rows)
    return np.bincount(drawn, minlength=4) / DRAWS


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (0.0, 1.0, [1, 0, 0, 0]),
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        # 0.5 < 0.6, so the second token still belongs; 0.8 >= 0.6, so the third does not.
        (1.0, 0.6, [0.625, 0.375, 0, 0]),
        (1.0, 0.49, [1, 0, 0, 0]),
        (1.0, 0.0, [1, 0, 0, 0]),
        # temperature 0.5 squares the probabilities: 0.25 : 0.09 : 0.0225 : 0.0025
        (0.5, 1.0, [0.685, 0.247, 0.062, 0.007]),
    ],
)
def test_frequencies(temperature: float, top_p: float, expected: list[float]) -> None:
    # three standard deviations of 4000 draws at p = 0.5
    np.testing.assert_allclose(frequencies(temperature, top_p), expected, atol=0.024)


def test_a_row_draws_the_same_whatever_it_stands_beside() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)

    def draw(rows: list[int]) -> list[int]:
        params = SamplingArrays(
            jnp.asarray([0.7, 0.0, 1.3])[jnp.asarray(rows)],
            jnp.asarray([1.0, 1.0, 0.4])[jnp.asarray(rows)],
            jnp.asarray([5, 6, 7], jnp.int32)[jnp.asarray(rows)],
            jnp.asarray([1, 2, 3], jnp.int32)[jnp.asarray(rows)],
        )
        return sample(jnp.asarray(logits[rows]), params).tolist()

    assert draw([0, 1, 2]) == draw([0]) + draw([1]) + draw([2])
    assert draw([2, 1, 0]) == draw([0, 1, 2])[::-1]


def test_nucleus_equals_sorting() -> None:
    """The textbook form, with a sort, on random rows; ties included."""
    dice = np.random.default_rng(1)
    scaled = np.round(dice.normal(size=(200, 64)) * 3, 1).astype(np.float32)
    top_p = dice.uniform(0, 1, 200).astype(np.float32)
    probability = np.asarray(jax.nn.softmax(jnp.asarray(scaled)))
    kept = np.isfinite(_nucleus(jnp.asarray(scaled), jnp.asarray(top_p)))
    for row in range(200):
        ordered = np.sort(probability[row])[::-1]
        count = int(np.searchsorted(np.cumsum(ordered), top_p[row])) + 1
        assert (kept[row] == (probability[row] >= ordered[count - 1])).all()
