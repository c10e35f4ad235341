"""Tokens by layer and expert, as an engine's steps count them, are those of the model's routing."""

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from mixtral_jax.checkpoint.adapter import StoredAdapter
from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.adapter import AdapterConfig
from mixtral_jax.model.adapter_stack import StackSizes
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.sharding import copies_of, make_mesh
from mixtral_jax.step.buckets import compile_buckets
from mixtral_jax.step.inputs import StepSizes
from serving.engine.build import compile_steps, engine_of, prepare
from serving.engine.config import EngineConfig
from serving.engine.engine import Engine
from serving.engine.expert_load import ExpertLoad
from serving.flags import SERVICE, defaults, record
from serving.scheduling.request import Request
from serving.scheduling.step_plan import Limits
from tests.serving.engine.test_same_programs import instructions
from tests.support import sources
from tests.support.adapters import random_adapter
from tests.support.models import model_of, split_over

CONFIG = from_hf(sources.MOE)  # 3 layers, 3 experts, 2 of them for each token
WIDE = replace(
    ModelConfig.tiny(vocab_size=67),
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_size=8,
    num_experts=4,
    experts_per_token=2,
    sliding_window=None,
)
LIMITS = Limits(
    num_pages=40,
    page_size=4,
    max_sequences=3,
    max_step_tokens=8,
    max_context=32,
    max_waiting=99,
    prefix_reuse=False,
)
SETTINGS = AdapterConfig(targets=("q", "router", "down"), rank=2, alpha=8.0)
# Prompts in chunks of several sizes, more of them than rows, so that steps have padding.
LENGTHS = [1, 11, 5, 17]
NEW = 6


def request(number: int, adapter: str = "") -> Request:
    dice = np.random.default_rng(number)
    return Request(
        id=f"{number}{adapter}",
        prompt_ids=tuple(dice.integers(0, 67, LENGTHS[number]).tolist()),
        sampling=SamplingParams(temperature=0.0),
        max_tokens=NEW,
        eos_ids=frozenset(),
        adapter=adapter,
    )


def sequences(engine: Engine, requests: Sequence[Request]) -> dict[str, list[int]]:
    """The tokens of each request that steps have computed: all but the last one drawn."""
    for asked in requests:
        engine.add(asked)
    tokens = {asked.id: [*asked.prompt_ids] for asked in requests}
    while engine.has_work:
        for event in engine.step():
            if event.drawn is not None:
                tokens[event.request_id].append(event.drawn.token_id)
    return {name: ids[:-1] for name, ids in tokens.items()}


def routed(
    model: Transformer, rows: Sequence[list[int]], stored: StoredAdapter | None = None
) -> np.ndarray:
    """The same counts [L E] by the model's full form, sequence by sequence."""
    total = np.zeros((model.config.num_layers, model.config.num_experts), np.int64)
    beside = None if stored is None else stored.adapter.folded(stored.settings)
    padded = np.zeros((len(rows), max(LENGTHS) + NEW), np.int32)
    for row, ids in enumerate(rows):
        padded[row, : len(ids)] = ids
    _, inside = model(jnp.asarray(padded), beside, capture=("routing",))
    for layer, choices in enumerate(np.asarray(inside.choice)):
        for ids, choice in zip(rows, choices, strict=True):
            total[layer] += np.bincount(choice[: len(ids)].reshape(-1), minlength=total.shape[1])
    return total


@pytest.mark.soak
def test_counts_of_steps_are_those_of_the_model_and_its_adapters() -> None:
    model, registry = model_of(CONFIG), CollectorRegistry()
    load = ExpertLoad(CONFIG, registry)
    stacks = StackSizes(slots=1, rank=2, targets=SETTINGS.targets)
    steps = compile_steps(model, LIMITS, has_masks=False, adapters=stacks, counts_experts=True)
    engine = engine_of(model, LIMITS, steps, expert_load=load)
    kept = random_adapter(CONFIG, SETTINGS, seed=1, size=0.5)
    stored = StoredAdapter(SETTINGS, kept, "a" * 64, "base")
    engine.load_adapter("red", stored)
    assert not load.tokens.any()
    plain = sequences(engine, [request(i) for i in range(4)])
    want = routed(model, list(plain.values()))
    np.testing.assert_array_equal(load.tokens, want)
    assert want.sum() == CONFIG.num_layers * 2 * sum(n + NEW - 1 for n in LENGTHS)
    # Beside rows of the base, those of an adapter that changes the router.
    both = [request(i, "red" if i % 2 else "") for i in range(4)]
    rows = sequences(engine, both)
    want += routed(model, [rows[r.id] for r in both if not r.adapter])
    want += routed(model, [rows[r.id] for r in both if r.adapter], stored)
    np.testing.assert_array_equal(load.tokens, want)
    lines = [line for line in generate_latest(registry).decode().splitlines() if line[:1] != "#"]
    assert len(lines) == CONFIG.num_layers * CONFIG.num_experts == 9
    assert f'mixtral_expert_tokens_total{{expert="2",layer="1"}} {float(want[1, 2])}' in lines


@pytest.mark.parametrize(
    ("shape", "dp_attention"),
    [
        pytest.param((2, 2, 1), False, id="groups and experts", marks=pytest.mark.soak),
        pytest.param((1, 4, 1), True, id="groups over experts", marks=pytest.mark.slow),
        pytest.param((2, 2, 2), False, id="all axes", marks=pytest.mark.soak),
    ],
)
def test_a_mesh_counts_all_of_its_tokens(shape: tuple[int, int, int], dp_attention: bool) -> None:
    whole = model_of(WIDE)
    mesh = make_mesh(*shape, copies=copies_of(WIDE, shape[1], shape[2], dp_attention))
    model, load = split_over(whole, mesh, dp_attention), ExpertLoad(WIDE)
    limits = replace(LIMITS, max_sequences=2)
    steps = compile_steps(model, limits, has_masks=False, counts_experts=True)
    engine = engine_of(model, limits, steps, expert_load=load)
    rows = sequences(engine, [request(i) for i in range(4)])
    np.testing.assert_array_equal(load.tokens, routed(whole, list(rows.values())))


def test_all_else_of_a_step_is_the_same_program() -> None:
    model = model_of(CONFIG)
    sizes = StepSizes(num_pages=8, page_size=4, max_sequences=2, max_context=16)
    plain, counting = (
        compile_buckets(model, sizes, {8: 2}, has_masks=False, counts_experts=counts)
        for counts in (False, True)
    )
    for name in ("embed", "pick", "draw"):
        texts = [instructions(getattr(steps.buckets[8], name)) for steps in (plain, counting)]
        assert texts[0] == texts[1], name
    assert plain.tally is None and counting.tally is not None
    blocks = [steps.buckets[8].blocks[0] for steps in (plain, counting)]
    assert [len(block.out_tree.children()) for block in blocks] == [2, 3]


def test_a_dense_model_is_refused_by_name() -> None:
    # tiny-random is a mixture; SmolLM2's form is not.
    given = defaults(SERVICE, model="tiny-random", expert_metrics=True)
    config = record(EngineConfig, given)
    pretrained = open_pretrained("tiny-random")
    dense = replace(pretrained.card.model, num_experts=0, experts_per_token=0)
    object.__setattr__(pretrained, "card", replace(pretrained.card, model=dense))
    with pytest.raises(ConfigError, match="--expert-metrics counts .* has none; leave it out"):
        prepare(config, pretrained, lambda line: None)
