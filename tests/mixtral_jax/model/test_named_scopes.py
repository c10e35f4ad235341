"""Compiled programs name the parts of the model, and are else the programs without the names."""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.stages import Compiled

from mixtral_jax.config import ModelConfig
from mixtral_jax.step.inputs import StepInputs, StepSizes
from mixtral_jax.step.programs import compile_walk
from mixtral_jax.step.split_model import SplitModel
from tests.support.models import model_of

MIXTURE = ModelConfig.tiny(vocab_size=64)
DENSE = replace(MIXTURE, num_experts=0, experts_per_token=0)
SIZES = StepSizes(num_pages=4, page_size=16, max_sequences=2, max_context=64)
ATTENTION = {f"attention/{part}" for part in ("norm", "qkv", "rope", "attend", "output")}
PARTS = {
    "dense": ATTENTION | {f"feed_forward/{part}" for part in ("norm", "gate_up", "down")},
    "mixture": ATTENTION | {f"feed_forward/{part}" for part in ("norm", "router", "experts")},
}


@pytest.fixture(scope="module", autouse=True)
def names_in_the_key_of_the_cache() -> Iterator[None]:
    """Programs that are kept between runs must not come back with other names."""
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    yield
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)


@pytest.fixture(scope="module", params=["dense", "mixture"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def named(kind: str, names_in_the_key_of_the_cache: None) -> dict[str, Compiled]:
    return compiled(kind)


def compiled(kind: str) -> dict[str, Compiled]:
    """The programs of a step that are the model's, and the full form."""
    model = model_of(DENSE if kind == "dense" else MIXTURE)
    split, inputs = SplitModel.of(model), StepInputs.blank(8, 2, SIZES, None)
    embed, (block,), *_ = compile_walk(split, split.pages(4, 16), inputs, num_drawn=2)
    x = jnp.zeros((2, model.config.hidden_size))
    score = jax.jit(lambda model, x: model.paged_logits(model.norm.paged(x)))
    full = jax.jit(lambda model, ids: model(ids))
    ids = jnp.zeros((2, 16), jnp.int32)
    return {
        "embed": embed,
        "block": block,
        "score": score.lower(model, x).compile(),
        "full": full.lower(model, ids).compile(),
    }


def names(program: Compiled) -> str:
    """The op_names of a program, one a line, each between slashes."""
    text = program.as_text()
    assert text is not None
    return "\n".join(f"/{name}/" for name in re.findall(r'op_name="([^"]*)"', text))


def instructions(program: Compiled) -> str:
    """The text of a program without its names and lines of source."""
    text = program.as_text()
    assert text is not None
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    first = re.search(r"^(%|ENTRY)", text, re.MULTILINE)
    assert first is not None
    return text[first.start() :]


def test_each_part_of_a_layer_is_named_in_the_step_of_a_server(
    kind: str, named: dict[str, Compiled]
) -> None:
    block = names(named["block"])
    assert {part for part in PARTS[kind] if f"/{part}/" not in block} == set()
    embed, score = names(named["embed"]), names(named["score"])
    assert "/embed/" in embed and "/rope/" in embed
    assert "/norm/" in score and "/head/" in score


def test_each_part_of_each_layer_is_named_in_the_full_form(
    kind: str, named: dict[str, Compiled]
) -> None:
    found = names(named["full"])
    for layer in range(DENSE.num_layers):
        missing = {part for part in PARTS[kind] if f"/layers.{layer}/{part}/" not in found}
        assert missing == set()
    assert "/embed/" in found and "/head/" in found


def test_names_change_nothing_else(
    kind: str, named: dict[str, Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "named_scope", nullcontext)
    unnamed = compiled(kind)
    for name, program in named.items():
        assert names(program) != names(unnamed[name])
        assert instructions(program) == instructions(unnamed[name])
