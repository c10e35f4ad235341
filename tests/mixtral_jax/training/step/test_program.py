"""What the compiled step holds and computes."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.kernels.cpu import build
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.model.transformer import held_bytes
from mixtral_jax.training.step.flops import step_flops
from mixtral_jax.training.step.program import TrainingProgram
from tests.support.models import model_of
from tests.support.training import settings

pytestmark = pytest.mark.slow
WIDE = replace(
    ModelConfig.tiny(vocab_size=509),
    **dict(hidden_size=128, feed_forward_size=320, num_layers=1, num_experts=0),
    experts_per_token=0,
)


def program(model: ModelConfig, mesh: str | None = None, **changes: Any) -> TrainingProgram:
    run = settings(rows=8, length=64, recompute=False, **changes)
    return TrainingProgram(model_of(model, mesh=mesh), run)


def products_of(text: str, *shape: int) -> list[str]:
    """Lines of a program whose products have a result of this shape."""
    sizes = ",".join(map(str, shape))
    return [line for line in text.splitlines() if re.search(rf"= f32\[{sizes}\]\S* dot\(", line)]


def test_a_frozen_model_is_an_argument_and_has_no_gradient() -> None:
    adapter, full = program(WIDE), program(WIDE, adapter=None)
    for out, inputs in ((320, 128), (128, 320), (509, 128)):
        shapes = ((out, inputs), (inputs, out))
        assert not any(products_of(adapter.text(), *shape) for shape in shapes)
        assert any(products_of(full.text(), *shape) for shape in shapes)
    model = model_of(WIDE)
    assert adapter.memory.frozen_bytes == held_bytes(model)
    # A master and two moments of every parameter, and five counters.
    assert full.memory.frozen_bytes == 0
    assert full.memory.state_bytes == pytest.approx(3 * held_bytes(model), abs=32)
    constants = re.findall(r"f32\[([\d,]+)\]\S* constant\(", adapter.text())
    assert max(np.prod([int(x) for x in sizes.split(",")]) for sizes in constants) < 10_000


@pytest.mark.parametrize("adapter", [AdapterConfig(rank=4), None], ids=["adapter", "full"])
def test_operations_are_those_that_the_compiler_counts(adapter: AdapterConfig | None) -> None:
    compiled = program(WIDE, adapter=adapter)
    counted = compiled.cost_of_one_pass
    # The compiler also counts what is no product, and the first layer needs no gradient of its x.
    assert counted is not None
    assert counted / step_flops(WIDE, compiled.config) == pytest.approx(1.0, abs=0.15)


@pytest.mark.skipif(not build.available(), reason="no C++ compiler: XLA:CPU drops the barriers")
def test_recomputed_layers_keep_one_array_each() -> None:
    """Their inputs [8 64 128], and gradients of an adapter, which are small beside them."""

    def temporaries(layers: int) -> int:
        model = model_of(replace(WIDE, num_layers=layers))
        run = settings(rows=8, length=64, recompute=True, adapter=AdapterConfig(rank=1))
        return TrainingProgram(model, run).memory.temporary_bytes

    assert (temporaries(5) - temporaries(2)) / 3 == pytest.approx(8 * 64 * 128 * 4, rel=0.2)


@pytest.mark.parametrize("adapter", [AdapterConfig(rank=8), None], ids=["adapter", "full"])
def test_trained_arrays_and_moments_are_cut_over_data(adapter: AdapterConfig | None) -> None:
    whole = program(WIDE, adapter=adapter)
    cut = program(WIDE, "data=8", adapter=adapter)
    assert cut.memory.state_bytes == pytest.approx(whole.memory.state_bytes / 8, rel=0.05)


def test_the_backward_pass_gathers_a_layer_anew() -> None:
    """Seven weights and two norms of the layer, beside the embedding, the last norm and the head.

    Else the whole weights of all layers would live from the forward pass to the backward one.
    """
    model = model_of(WIDE, mesh="data=8")
    text = TrainingProgram(model, settings(rows=8, length=16, adapter=None)).text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    again = [line for line in gathers if "rematted_computation" in line]
    assert (len(again), len(gathers) - len(again)) == (9, 9 + 3)


def test_rows_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 rows of a micro-batch cannot be split over 8 groups"):
        program(WIDE, "data=8", micro_batches=2)
