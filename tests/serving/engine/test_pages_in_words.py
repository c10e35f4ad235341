"""The engine over a TPU's small pages in words, and the kernel that reads them, interpreted."""

from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from mixtral_jax.axes import FlatKeys, FlatQueries, Pages
from mixtral_jax.cache import RaggedBatch
from mixtral_jax.config import ModelConfig
from mixtral_jax.generation import generate_draws
from mixtral_jax.kernels import kernels_for
from mixtral_jax.kernels.tpu import attention
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.placement import Placement
from mixtral_jax.sampling_params import SamplingParams
from serving.engine.build import compile_steps, engine_of
from serving.scheduling.request import Request
from serving.scheduling.step_plan import Limits
from tests.support.forms import ids, served

LIMITS = Limits(
    num_pages=6,
    page_size=128,
    max_sequences=3,
    max_step_tokens=64,
    max_context=160,
    max_waiting=9,
)


def attend(
    q: FlatQueries,
    k: FlatKeys,
    v: FlatKeys,
    pages: Pages,
    batch: RaggedBatch,
    window: int | None,
) -> tuple[FlatQueries, Pages]:
    return attention.attend(q, k, v, pages, batch, window, interpret=True)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_greedy_tokens_equal_the_plain_loop_with_such_pages(dtype: str) -> None:
    """Prompts shorter and longer than a page, taken in beside answers of others."""
    config = replace(
        ModelConfig.tiny(vocab_size=61),
        num_heads=2,
        num_kv_heads=1,
        head_size=128,
        num_layers=1,
        max_context=160,
    )
    kernels = replace(
        kernels_for("xla"), attend=attend, page_form=attention.page_form, page_size=128
    )
    placement = replace(Placement.of(config, mesh=None), kernels=kernels, step_tokens=64)
    model = Transformer(config, placement, rngs=nnx.Rngs(3))
    kind = placement.checked_kv_dtype(dtype, config)
    steps = compile_steps(model, LIMITS, kv_dtype=kind, has_masks=False, buckets=(8, 64))
    engine = engine_of(model, LIMITS, steps)
    dice = np.random.default_rng(0)
    prompts = [tuple(int(i) for i in dice.integers(0, 61, n)) for n in (5, 140, 70)]
    greedy = SamplingParams(temperature=0.0)
    requests = [
        Request(
            id=str(number), prompt_ids=prompt, sampling=greedy, max_tokens=6, eos_ids=frozenset()
        )
        for number, prompt in enumerate(prompts)
    ]
    events = served(engine, *requests)
    for request in requests:
        drawn = generate_draws(model, request.prompt_ids, greedy, max_tokens=6, kv_dtype=dtype)
        assert ids(events[request.id, 0]) == [draw.token_id for draw in drawn]
