"""What a grouped product on TPU fetches, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.tpu import products
from mixtral_jax.kernels.tpu.tiles import Tiles, fetches, visits
from mixtral_jax.kernels.tpu.walk import Walk

SIZES = [[3, 0, 7], [0, 0, 0], [8, 8, 0], [0, 0, 1], [1, 1, 1], [0, 15, 1], [5, 4, 12]]


def test_visits_by_hand() -> None:
    """Tiles of 8 rows: an expert without rows has no visit, one across a border has two."""
    assert visits([3, 0, 7], 8) == [(0, 0), (2, 0), (2, 1)]
    assert visits([8, 8, 0], 8) == [(0, 0), (1, 1)]
    assert visits([0, 0, 0], 8) == []


@pytest.mark.parametrize("sizes", SIZES)
def test_the_kernel_walks_over_these_visits(sizes: list[int]) -> None:
    """They are megablox's as well."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

    given = jnp.asarray(sizes, jnp.int32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        walk, count = Walk.of(given, 24, 8)
        (_, experts, tiles), theirs = make_group_metadata(
            group_sizes=given,
            m=24,
            tm=8,
            start_group=jnp.zeros((), jnp.int32),
            num_nonzero_groups=3,
            visit_empty_groups=False,
        )
    np.testing.assert_array_equal(walk.starts, np.cumsum([0, *sizes]))
    ours = [*zip(walk.expert.tolist(), walk.tile.tolist(), strict=True)]
    assert ours[: int(count)] == visits(sizes, 8)
    megablox = [*zip(experts.tolist(), tiles.tolist(), strict=True)]
    assert megablox[: int(theirs)] == visits(sizes, 8)


def test_few_rows_fetch_the_chosen_experts_once_and_their_rows_once() -> None:
    """Two rows of two of eight experts, [1792, 4096] in bfloat16: all inputs by 256 outputs."""
    tiles = Tiles.of(2, 4096, 1792, jnp.bfloat16)
    assert tiles == (16, 4096, 256)
    found = fetches([0, 0, 1, 0, 0, 0, 1, 0], tiles, 4096, 1792)
    assert found.weights == [(expert, column, 0) for column in range(7) for expert in (2, 6)]
    assert found.rows == [(0, 0)]
    weight = jax.ShapeDtypeStruct((8, 1792, 4096), jnp.bfloat16)
    assert products.expert_reads([0, 0, 1, 0, 0, 0, 1, 0], 2, weight) == 2
    assert products.expert_reads([0] * 8, 2, weight) == 0


def test_many_rows_fetch_an_expert_for_each_of_its_tiles() -> None:
    """600 rows of 1,024 in tiles of 512: the second expert's are in both, so it is read twice."""
    tiles = Tiles.of(1024, 4096, 1792, jnp.bfloat16)
    assert tiles == (512, 1024, 896)
    found = fetches([500, 100, 0], tiles, 4096, 1792)
    assert len(found.weights) == 3 * 2 * 4  # visits, columns, steps
    assert (
        products.expert_reads(
            [500, 100, 0], 1024, jax.ShapeDtypeStruct((3, 1792, 4096), jnp.bfloat16)
        )
        == 3
    )


@pytest.mark.parametrize(
    ("rows", "dtype", "tile"),
    [(1, "float32", 8), (9, "float32", 16), (2, "bfloat16", 16), (2, "int8", 32), (40, "int8", 64)],
)
def test_few_rows_are_filled_up_to_a_row_of_near_memory(rows: int, dtype: str, tile: int) -> None:
    assert Tiles.of(rows, 128, 256, jnp.dtype(dtype)).rows == tile


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "tiles"),
    [
        (2, 4096, 3584, (16, 4096, 256)),
        (40, 3584, 4096, (48, 3584, 256)),
        (600, 14336, 4096, (128, 3584, 256)),  # at most 128 groups a tile
        (8, 4608, 384, (16, 2304, 128)),
    ],
)
def test_tiles_of_int4(rows: int, inputs: int, outputs: int, tiles: tuple[int, ...]) -> None:
    assert Tiles.of(rows, inputs, outputs, jnp.uint8) == tiles


def test_experts_of_int4_that_are_fetched() -> None:
    """Two experts of few rows. Of 150 rows in tiles of 128 the second expert's are in both tiles,
    so it is fetched again where its inputs are more than a tile's.
    """
    weight = jax.ShapeDtypeStruct((8, 1792, 2048), jnp.uint8)
    assert products.expert_reads([0, 0, 1, 0, 0, 0, 1, 0], 2, weight) == 2
    assert products.expert_reads([100, 50, 0], 150, weight) == 2
    assert (
        products.expert_reads([100, 50, 0], 150, jax.ShapeDtypeStruct((3, 256, 7168), jnp.uint8))
        == 3
    )
