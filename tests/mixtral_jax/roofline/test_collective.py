"""Seconds of collectives, by hand."""

from mixtral_jax.roofline.collective import Collective


def test_collectives_take_as_long_as_a_ring() -> None:
    seconds = {
        kind: Collective(kind, 800, 8, False).seconds(bandwidth=100.0, latency=0.5)
        for kind in ("all-reduce", "all-gather", "collective-permute")
    }
    assert seconds == {
        "all-reduce": 2 * 700 / 100 + 2 * 4 * 0.5,
        "all-gather": 700 / 100 + 4 * 0.5,
        "collective-permute": 8.5,
    }
