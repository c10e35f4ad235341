"""Names of topologies, and what does not exist."""

import pytest

from mixtral_jax.errors import TopologyError
from mixtral_jax.roofline.chips import GIB, topologies


def test_a_topology_is_one_slice_or_all_of_a_chip() -> None:
    (topology,) = topologies("tpu:v5e:2x4")
    assert (topology.chips, str(topology), topology.chip.memory) == (
        8,
        "tpu:v5e:2x4",
        int(15.75 * GIB),
    )
    assert [size.chips for size in topologies("tpu:v5p")] == [4, 8, 16, 32, 64, 128, 256, 512]
    assert topologies("gpu:a100-80:4")[0].chips == 4
    assert topologies("cpu:3")[0].chips == 3


def test_a_chip_of_v7x_is_two_devices() -> None:
    """Each has a half of its 192 GiB, of which the compiler takes some."""
    (topology,) = topologies("tpu:v7x:2x2x1")
    assert (topology.chips, topology.chip.memory) == (8, int(94.75 * GIB))
    assert [size.chips for size in topologies("tpu:v7x")][:2] == [2, 8]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tpu:v9:2x4", "v9 is no known tpu chip; known are v5e, v5p, v6e"),
        ("tpu:v5e:3x3", "no such slice of v5e; there are 1x1, 2x2, 2x4"),
        ("gpu:h100:7", "no such slice of h100; there are 1, 2, 4, 8"),
        ("abacus:8", "no known platform; give tpu:v5e:2x4"),
        ("v6e:2x4", "'v6e:2x4' names no platform; give tpu:v6e:2x4"),
        ("tpu", "nothing is no known tpu chip"),
        ("cpu:many", "give cpu:N"),
    ],
)
def test_what_does_not_exist_is_refused(name: str, said: str) -> None:
    with pytest.raises(TopologyError, match=said):
        topologies(name)
