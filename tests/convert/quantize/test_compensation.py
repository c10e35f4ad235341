"""Weights make up for each other's rounding, and for what their products lack."""

import jax.numpy as jnp
import numpy as np
import pytest

from convert.quantize import compensation
from convert.quantize.compensation import Rounder, moment
from mixtral_jax.weight import Weight

GENERATOR = np.random.default_rng(0)
# Rows whose inputs have something in common, and a weight that meets them.
SHARED = GENERATOR.standard_normal((500, 8)) @ GENERATOR.standard_normal((8, 96))
ROWS = (SHARED + 0.3 * GENERATOR.standard_normal((500, 96))).astype(np.float32)
WEIGHT = GENERATOR.standard_normal((40, 96)).astype(np.float32)


def products(weight: Weight) -> np.ndarray:
    return ROWS @ np.asarray(weight.widened(jnp.float32)).T


def lost(weight: Weight) -> float:
    """The mean square of what the products lost."""
    return float(np.mean((products(weight) - ROWS @ WEIGHT.T) ** 2))


NEAREST = lost(Weight.quantized(jnp.asarray(WEIGHT), "int4"))


def test_weights_make_up_for_each_other() -> None:
    """The error of their products falls to less than half, that of its square to a quarter."""
    assert lost(Rounder(jnp.asarray(ROWS)).rounded(WEIGHT)) < 0.25 * NEAREST


def test_inputs_that_are_taken_apart_make_up_for_those_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three of 32: better than each 32 for itself, whose errors add up."""
    monkeypatch.setattr(compensation, "_MOST_INPUTS", 32)
    together = Rounder(jnp.asarray(ROWS)).rounded(WEIGHT)
    columns = [slice(start, start + 32) for start in range(0, 96, 32)]
    apart = [Rounder(jnp.asarray(ROWS[:, c])).rounded(WEIGHT[:, c]) for c in columns]
    widened = [np.asarray(weight.widened(jnp.float32)) for weight in apart]
    error = np.mean((ROWS @ (np.concatenate(widened, axis=1) - WEIGHT).T) ** 2)
    assert lost(together) < 0.8 * error


@pytest.mark.parametrize("together", [96, 32])
def test_products_gain_half_of_what_they_lack(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they lack is what other weights would give, so that the best fit would be all of it."""
    monkeypatch.setattr(compensation, "_MOST_INPUTS", together)
    change = 0.3 * GENERATOR.standard_normal(WEIGHT.shape).astype(np.float32)
    lacking = ROWS @ change.T
    rows = jnp.asarray(ROWS)
    rounded = Rounder(rows).rounded(WEIGHT, moment(jnp.asarray(lacking), rows))
    gained = products(rounded) - ROWS @ WEIGHT.T
    assert np.sum(gained * lacking) / np.sum(lacking**2) == pytest.approx(0.5, abs=0.02)


def test_a_weight_on_its_grid_stays_there() -> None:
    levels = GENERATOR.integers(0, 16, (8, 64))
    levels[:, ::32], levels[:, 1::32] = 0, 15  # each group has both ends
    weight = (levels / 4 - 2).astype(np.float32)
    rows = GENERATOR.standard_normal((100, 64)).astype(np.float32)
    rounded = Rounder(jnp.asarray(rows)).rounded(weight)
    np.testing.assert_array_equal(rounded.widened(jnp.float32), weight)


def test_inputs_that_no_row_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are rounded like the others, apart or together."""
    rows = jnp.asarray(ROWS).at[:, 32:64].set(0)
    for together in (96, 32):
        monkeypatch.setattr(compensation, "_MOST_INPUTS", together)
        rounded = np.asarray(Rounder(rows).rounded(WEIGHT).widened(jnp.float32))
        assert np.abs(rounded - WEIGHT)[:, 32:64].max() < 0.5


def test_without_rows_each_weight_goes_to_the_nearest_value() -> None:
    rounded = Rounder(jnp.zeros((0, 96))).rounded(WEIGHT)
    assert lost(rounded) == NEAREST
