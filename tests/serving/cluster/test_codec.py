"""Layers of adapters and slots of chunks arrive at other hosts as they were sent."""

from dataclasses import replace

import numpy as np
import pytest

from serving.cluster.codec import layer_message, layer_of, plans_of, step_message
from serving.cluster.leader import GroupError
from serving.cluster.plan_check import PlanCheck
from serving.engine.device import PutLayer
from serving.proto import group_pb2 as pb
from serving.scheduling.step_plan import StepPlan
from tests.serving.cluster.test_plan_check import CHUNK, LIMITS, VOCABULARY, plans


def test_a_layer_of_an_adapter_arrives_in_every_bit() -> None:
    drawn = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return drawn.standard_normal(shape).astype(np.float32)

    matrices = {"q": (matrix(2, 8), matrix(4, 2, 2)), "down": (matrix(3, 2, 5), matrix(3, 8, 2))}
    message = layer_message(PutLayer(1, 7, matrices)).SerializeToString()
    arrived = layer_of(pb.PutLayer.FromString(message))
    assert (arrived.slot, arrived.layer) == (1, 7)
    assert arrived.matrices.keys() == matrices.keys()
    for target, pair in matrices.items():
        for got, sent in zip(arrived.matrices[target], pair, strict=True):
            np.testing.assert_array_equal(got, sent)


@pytest.mark.parametrize("slot", [-1, 0, 3])
def test_a_chunk_keeps_its_slot(slot: int) -> None:
    chunk = StepPlan(chunks=(replace(CHUNK, slot=slot),))
    assert plans_of(step_message((chunk,))) == (chunk,)


def test_slots_and_layers_that_do_not_exist_are_refused() -> None:
    check = PlanCheck(LIMITS, 2, VOCABULARY, num_layers=2, num_slots=2)
    check.check_layer(PutLayer(1, 1, {}))
    with pytest.raises(GroupError, match="slot of an adapter of 2, where 1 is the most"):
        check.check_layer(PutLayer(2, 1, {}))
    with pytest.raises(GroupError, match="layer of an adapter of 2, where 1 is the most"):
        check.check_layer(PutLayer(1, 2, {}))
    chunk = replace(CHUNK, slot=2)
    with pytest.raises(GroupError, match="slot of an adapter of 2"):
        check.check(plans(chunk))


def test_targets_arrive_and_follow_tokens_of_their_chunk() -> None:
    count = len(CHUNK.token_ids)
    targets = (3,) * count
    chunk = replace(CHUNK, targets=targets, target_start=CHUNK.start + 1, asked=5)
    assert plans_of(step_message((StepPlan(chunks=(chunk,)),))) == (StepPlan(chunks=(chunk,)),)
    PlanCheck(LIMITS, 2, VOCABULARY).check(plans(chunk))
    for wrong, message in (
        (replace(chunk, targets=(VOCABULARY,)), "token id"),
        (replace(chunk, target_start=CHUNK.start + 2), "target"),
        (replace(chunk, target_start=CHUNK.start), "target"),
    ):
        with pytest.raises(GroupError, match=message):
            PlanCheck(LIMITS, 2, VOCABULARY).check(plans(wrong))
