"""Scores of texts are log_softmax of the model's logits, whatever they are computed beside."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixtral_jax
from mixtral_jax import scoring
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import UserError
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from tests.support.models import model_of

TOKENIZER = ByteTokenizer()
CONFIG = replace(ModelConfig.tiny(vocab_size=TOKENIZER.vocab_size), max_context=64)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return model_of(CONFIG)


def expected(model: Transformer, rows: list[tuple[int, ...]]) -> list[list[float]]:
    tokens = np.zeros((len(rows), CONFIG.max_context), np.int32)
    for place, ids in enumerate(rows):
        tokens[place, : len(ids)] = ids
    logprobs = np.asarray(jax.jit(lambda: jax.nn.log_softmax(model(jnp.asarray(tokens))))())
    return [
        [float(logprobs[row, place, token]) for place, token in enumerate(ids[1:])]
        for row, ids in enumerate(rows)
    ]


def test_each_text_has_the_logprobs_of_its_tokens_but_the_first(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of two lengths, in three batches; one text has one token, one fills the context."""
    monkeypatch.setattr(scoring, "_BATCH_TOKENS", 64)
    texts = ["a b", "", "over", [7], [*range(40, 104)], "fox", "dog"]
    scores = mixtral_jax.score(model, TOKENIZER, texts)
    ids = [
        tuple(TOKENIZER.encode(text)) if isinstance(text, str) else tuple(text) for text in texts
    ]
    assert [found.token_ids for found in scores] == ids
    assert (scores[3].logprobs, scores[3].total) == ((), 0.0)
    for found, wanted in zip(scores, expected(model, ids), strict=True):
        np.testing.assert_allclose(found.logprobs, wanted, atol=2e-5)
        assert found.total == pytest.approx(sum(wanted), abs=1e-3)


def test_wrong_texts_are_named(model: Transformer) -> None:
    for texts, message in (
        ("one text", "give a list of texts"),
        ([b"ab"], "a text is of the type bytes"),
        ([[]], "a text is empty"),
        ([[0] * 65], "a text has 65 tokens, the context of this model holds 64"),
        ([[CONFIG.vocab_size]], f"holds the id {CONFIG.vocab_size}"),
    ):
        with pytest.raises(UserError, match=message):
            mixtral_jax.score(model, TOKENIZER, texts)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="there is no tokenizer"):
        mixtral_jax.score(model, None, ["a"])
    assert mixtral_jax.score(model, None, []) == []


@pytest.mark.slow
def test_a_mesh_gives_the_same() -> None:
    """Eight devices, which have a part of the sequences, of the heads and of the experts each."""
    config = replace(CONFIG, num_heads=8, num_kv_heads=4, head_size=8, num_experts=8)
    texts = [[5, 6, 7, 8], [9, 10, 11]]
    split = model_of(config, mesh="expert=4,tensor=2", dp_attention=True)
    for ours, theirs in zip(
        mixtral_jax.score(split, None, texts),
        mixtral_jax.score(model_of(config), None, texts),
        strict=True,
    ):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)
