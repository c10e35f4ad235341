"""Splits of a model over chips."""

from mixtral_jax.roofline.split import candidates
from mixtral_jax.sharding import ShardingRules
from tests.support.plan_workload import DENSE, SMALL


def test_every_split_is_one_that_the_model_can_be_split_into() -> None:
    splits = candidates(SMALL, batch=8, chips=8)
    assert {(split.data, split.expert, split.tensor) for split in splits} >= {(1, 8, 1), (1, 1, 8)}
    for split in splits:
        ShardingRules.of(SMALL, split.mesh, split.dp_attention).check(SMALL, split.mesh)
        assert split.chips == 8
    assert candidates(DENSE, batch=1, chips=3) == []
