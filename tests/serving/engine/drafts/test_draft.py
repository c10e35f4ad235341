"""A draft's checkpoint: what is refused, and the memory that it takes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.checkpoint.pretrained import Pretrained, open_pretrained
from mixtral_jax.errors import ConfigError
from mixtral_jax.generation import generate_tokens
from mixtral_jax.placement import Placement
from mixtral_jax.sharding import make_mesh
from serving.engine.build import engine_of, prepare
from serving.engine.drafts.draft import Draft
from serving.scheduling.step_plan import Limits
from tests.serving.engine.drafts.test_drafter import one, tokens_of
from tests.serving.engine.test_build import config_of

TOY = open_pretrained("tiny-random")


def opened(model: Pretrained = TOY, folder: str = "tiny-random", **placed: Any) -> Draft:
    placed.setdefault("mesh", None)
    return Draft.open(folder, model, Placement.of(model.card.model, **placed))


def with_config(**changes: Any) -> Pretrained:
    """The toy with another config."""
    return replace(TOY, card=replace(TOY.card, model=replace(TOY.card.model, **changes)))


def test_a_draft_of_another_vocabulary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    size = TOY.card.model.vocab_size
    message = f"--draft-model tiny-random has another vocabulary: it has {size} ids, and "
    with pytest.raises(ConfigError, match=message + "tiny-random has 999"):
        opened(with_config(vocab_size=999))
    other = open_pretrained("tiny-random")
    tokenizer: Any = other.tokenizer
    monkeypatch.setattr(tokenizer, "_pieces", (*tokenizer._pieces[:65], b"?"))
    with pytest.raises(ConfigError, match="the id 65 stands for another text there than in"):
        opened(other)


def test_a_draft_beside_several_groups_of_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match="for one group of sequences in one process; leave it"):
        opened(mesh=make_mesh(2, 1, 1))


def test_a_draft_that_cannot_be_split_as_the_model_is_refused() -> None:
    heads = with_config(num_heads=8, num_kv_heads=8, head_size=8)
    with pytest.raises(ConfigError, match="--draft-model tiny-random cannot stand on the devices"):
        opened(heads, mesh="data=1,expert=1,tensor=8")


def test_a_draft_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a mixtral-jax checkpoint"):
        opened(folder=str(tmp_path))


@pytest.mark.parametrize(
    ("model", "own", "window"), [(None, None, None), (16, None, 16), (None, 8, 8), (16, 32, 16)]
)
def test_a_draft_sees_no_further_than_the_model(
    model: int | None, own: int | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model gives back the pages before its window, and with them the hope to guess better."""
    name = "serving.engine.drafts.draft.open_pretrained"
    monkeypatch.setattr(name, lambda folder: with_config(sliding_window=own))
    assert opened(with_config(sliding_window=model)).abstract.config.sliding_window == window


def test_a_quarter_of_the_pages_is_beside_those_of_the_model() -> None:
    """Half of the rows, and for each of them no more pages than its context has."""
    draft = opened()
    limits = Limits(
        num_pages=40,
        page_size=16,
        max_sequences=5,
        max_step_tokens=9,
        max_context=128,
        max_waiting=9,
    )
    own = draft.limits(limits)
    assert (own.num_pages, own.max_sequences, own.max_step_tokens) == (10, 2, 9)
    assert (own.max_context, own.window) == (128, draft.abstract.config.sliding_window)
    assert draft.limits(replace(limits, num_pages=400)).num_pages == 2 * 8
    assert draft.limits(replace(limits, num_pages=20, window=None)).num_pages == 5
    config = TOY.card.model
    of_page = config.num_layers * 16 * 2 * config.num_kv_heads * config.head_size * 4
    assert draft.page_bytes(16, "float32") == of_page / 4
    assert draft.kv_dtype(16, "int8") == "int8" and draft.kv_dtype(16, "bfloat16") == "float32"


@pytest.mark.slow
def test_serving_the_toy_with_itself_as_its_draft() -> None:
    """The flag, the memory that both share, and an answer all of whose guesses are right."""
    lines: list[str] = []
    given = {"kv_memory": 1, "max_sequences": 8, "max_step_tokens": 16, "step_buckets": "8"}
    made = prepare(config_of(draft_model="tiny-random", **given), TOY, lines.append)
    assert made.draft is not None
    config = TOY.card.model
    of_page = config.num_layers * 16 * 2 * config.num_kv_heads * config.head_size * 4
    assert made.limits.num_pages == (1 << 20) * 4 // (of_page * 5)
    assert any(line.startswith("loading the draft model tiny-random, with room") for line in lines)
    engine = engine_of(made.model, made.limits, made.steps, drafter=made.draft.drafter())
    answer = tokens_of(engine, one([7, 8, 9], 40))
    assert answer == [*generate_tokens(made.model, [7, 8, 9], max_tokens=40)]
    assert engine.scheduler.accepted == engine.scheduler.guesses > 20


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"speculate": "lookup"}, "--speculate lookup and --draft-model both guess"),
        ({"max_sequences": 1}, "--draft-model has no row for a guess with --max-sequences 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(draft_model="tiny-random", **given)
