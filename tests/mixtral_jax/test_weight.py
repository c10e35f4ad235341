"""Rounding by hand: int4's grids, its two values in a byte, and what is no whole group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.errors import ConfigError
from mixtral_jax.weight import GROUP_SIZE, Grid, Weight, packed, unpacked


def test_two_inputs_stand_in_a_byte_the_even_one_in_its_low_bits() -> None:
    levels = jnp.asarray([[1, 2, 15, 0]], jnp.uint8)
    assert packed(levels).tolist() == [[1 + 16 * 2, 15]]
    assert unpacked(packed(levels)).tolist() == levels.tolist()


def test_values_of_a_grid_are_kept() -> None:
    """Sixteen values, each twice: from -2 in steps of a quarter, and from 8 in steps of 2."""
    levels = np.arange(GROUP_SIZE) % 16
    weight = jnp.asarray([np.concatenate([levels / 4 - 2, levels * 2 + 8])], jnp.float32)
    rounded = Weight.quantized(weight, "int4")
    assert rounded.values.shape == (1, GROUP_SIZE) and rounded.values.dtype == jnp.uint8
    assert rounded.scale is not None and rounded.scale.dtype == jnp.float16
    assert rounded.scale.tolist() == [[[0.25, -2.0], [2.0, 8.0]]]
    np.testing.assert_array_equal(rounded.widened(jnp.float32), weight)


def test_equal_values_need_no_steps() -> None:
    rounded = Weight.quantized(jnp.full((2, GROUP_SIZE), 0.5), "int4")
    assert np.unique(rounded.widened(jnp.float32)).tolist() == [0.5]


def test_a_far_value_is_cut_where_that_is_better_for_the_others() -> None:
    """One of 32 is far away: wide steps for all would cost more than its own change."""
    weight = jax.random.normal(jax.random.key(0), (64, GROUP_SIZE)).at[:, 3].set(6.0)
    rounded = Weight.quantized(weight, "int4").widened(jnp.float32)
    assert float(jnp.min(rounded[:, 3])) < 5.9
    costs = jnp.ones(GROUP_SIZE).at[3].set(1000.0)
    kept = Grid.of(weight, costs)
    np.testing.assert_allclose(kept.values(kept.levels(weight))[:, 3], 6.0, atol=0.01)


def test_even_values_lose_what_sixteen_steps_lose() -> None:
    weight = jax.random.uniform(jax.random.key(0), (16, 3, 96), minval=-1, maxval=1)
    change = jnp.abs(Weight.quantized(weight, "int4").widened(jnp.float32) - weight)
    assert float(jnp.sqrt(jnp.mean(change**2))) < 2 / 15 / np.sqrt(12) * 1.05


@pytest.mark.parametrize("inputs", [1, 31, 48])
def test_what_is_no_whole_group_is_refused(inputs: int) -> None:
    with pytest.raises(ConfigError, match=f"groups of 32 inputs, and a weight has {inputs},"):
        Weight.quantized(jnp.zeros((2, inputs)), "int4")


def test_halves_are_the_columns_of_the_widened_weight() -> None:
    rounded = Weight.quantized(jax.random.normal(jax.random.key(0), (2, 3, 64)), "int4")
    wide = rounded.widened(jnp.bfloat16)
    for turn, half in enumerate(rounded.halves(jnp.bfloat16)):
        np.testing.assert_array_equal(half, wide[..., turn::2])


def test_a_tile_has_a_word_of_each_output_after_a_word_of_each() -> None:
    """Output o of 32 has the bytes 8 o .. 8 o + 7, and the scales 2 o and 2 o + 1."""
    values = jnp.arange(32 * 8, dtype=jnp.uint8).reshape(32, 8)
    scale = jnp.arange(32 * 2, dtype=jnp.float16).reshape(32, 2)
    weight = Weight(jnp.tile(values, 2), scale[:, None, :])
    tiles = weight.in_tiles()
    assert (tiles.values.shape, tiles.values.dtype) == ((32, 4), jnp.uint32)
    memory = np.asarray(tiles.values).reshape(-1).view(np.uint8)
    np.testing.assert_array_equal(memory[:12], [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19])
    np.testing.assert_array_equal(memory[64:68], [4, 5, 6, 7])  # the second words of the tile
    np.testing.assert_array_equal(memory[256:260], [128, 129, 130, 131])  # the second tile
    scales = np.asarray(tiles.scale).reshape(-1)
    np.testing.assert_array_equal(scales[:17], [*range(0, 32, 2), 1])
    for before, after in zip(weight, tiles.in_rows(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_outputs_that_are_no_whole_tiles_stay_as_they_are() -> None:
    weight = Weight.quantized(jnp.ones((2, 24, 32)), "int8x16")
    assert weight.in_tiles() is weight
    assert weight.in_tiles(inputs=2) is weight
    assert Weight.quantized(jnp.ones((16, 2, 32)), "int8x16").in_tiles(inputs=2).is_in_tiles
