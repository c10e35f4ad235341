"""The full form equals logits that transformers computed, on Pythons that have no torch too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model.transformer import Transformer
from tests.support import parity, recorded_logits


@jax.jit
def full(model: Transformer, ids: jax.Array) -> jax.Array:
    return model(ids)


@pytest.mark.parametrize("kind", list(parity.MODELS))
def test_full_form_equals_recorded_logits(kind: str) -> None:
    source, want = recorded_logits.recorded(kind)
    assert np.abs(want).max() > 1  # a model that answers zero would pass everything below
    got = full(
        parity.twin_of(source, parity.MODELS[kind]().to_dict()), jnp.asarray(recorded_logits.TOKENS)
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", list(parity.MODELS))
def test_the_record_is_what_transformers_computes(kind: str) -> None:
    pytest.importorskip("torch", reason="no torch for this Python: see the test extra")
    source, want = recorded_logits.recorded(kind)
    shapes, logits = recorded_logits.computed(kind)
    assert shapes == {name: list(value.shape) for name, value in source.items()}
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5)
