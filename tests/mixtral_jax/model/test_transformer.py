"""The full form equals transformers; the paged form equals the full form."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.cache import PagedCache, RaggedBatch
from mixtral_jax.kernels import kernels_for
from mixtral_jax.kernels.cpu import build
from mixtral_jax.model.transformer import Transformer, named_parameters
from mixtral_jax.placement import Placement
from tests.support import parity

LENGTH = 64


@jax.jit
def full(model: Transformer, ids: jax.Array) -> jax.Array:
    return model(ids)


@pytest.fixture(scope="module", params=list(parity.MODELS))
def ours(request: pytest.FixtureRequest) -> Transformer:
    return parity.random_model(request.param)


def tokens(rows: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, vocab_size, (rows, LENGTH), np.int32)


@pytest.mark.parametrize("kind", list(parity.MODELS))
def test_full_form_equals_transformers(kind: str) -> None:
    theirs = parity.huggingface(kind)
    import torch

    ids = tokens(2, parity.SHAPE["vocab_size"])
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids).long()).logits.numpy()
    assert np.abs(want).max() > 1  # a model that answers zero would pass everything below
    got = full(parity.twin(theirs), jnp.asarray(ids))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def paged_logits(
    model: Transformer, sequences: list[list[int]], chunk: int, page_size: int
) -> list[np.ndarray]:
    """Feeds sequences in chunks through one ragged batch a step; logits of every position.

    Pages are handed out in a scrambled order, and a sequence that has fewer tokens ends earlier:
    in the last steps the batch is mixed and partly unused.
    """
    width = -(-max(map(len, sequences)) // page_size)
    scrambled = np.random.default_rng(0).permutation(len(sequences) * width).astype(np.int32)
    table = scrambled.reshape(len(sequences), width)
    cache = PagedCache.empty(model.config, table.size, page_size, jnp.float32)
    # Places that nobody has written may hold anything, and must not be felt.
    cache = jax.tree.map(lambda pages: jnp.full_like(pages, jnp.nan), cache)
    graph, state = nnx.split(model)

    @jax.jit
    def step(state: nnx.State, batch: RaggedBatch, cache: PagedCache) -> tuple:
        model = nnx.merge(graph, state)
        hidden, cache = model.paged(batch, cache)
        return model.logits(hidden), cache

    done = [0] * len(sequences)
    out: list[list[np.ndarray]] = [[] for _ in sequences]
    room = chunk * len(sequences) + 2
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        live = [i for i, s in enumerate(sequences) if done[i] < len(s)]
        take = {i: min(chunk, len(sequences[i]) - done[i]) for i in live}
        live.sort(key=lambda i: take[i] > 1)
        flat, positions, starts = [], [], [0]
        for i in live:
            flat += sequences[i][done[i] : done[i] + take[i]]
            positions += range(done[i], done[i] + take[i])
            starts.append(len(flat))
        lengths = [done[i] + take[i] for i in live]

        def pad(values: list[int], size: int) -> jax.Array:
            return jnp.asarray(values + [0] * (size - len(values)), jnp.int32)

        batch = RaggedBatch(
            tokens=pad(flat, room),
            positions=pad(positions, room),
            query_starts=pad(starts, len(sequences) + 1),
            lengths=pad(lengths, len(sequences)),
            page_table=jnp.asarray(table[live + [0] * (len(sequences) - len(live))]),
            num_decodes=jnp.int32(sum(take[i] == 1 for i in live)),
            num_sequences=jnp.int32(len(live)),
        )
        logits, cache = step(state, batch, cache)
        for place, i in enumerate(live):
            out[i].append(np.asarray(logits[starts[place] : starts[place + 1]]))
            done[i] += take[i]
    return [np.concatenate(rows) for rows in out]


@pytest.fixture(params=["cpu", "xla"])
def kernels(request: pytest.FixtureRequest) -> str:
    """The platform whose kernels are used: C++, or the XLA forms in their place."""
    if request.param == "cpu" and not build.available():
        pytest.skip("no C++ compiler: the kernels are not used on this machine")
    return str(request.param)


def with_kernels(model: Transformer, platform: str) -> Transformer:
    """A model with the same values that is placed with another platform's kernels."""
    placement = replace(model.placement, kernels=kernels_for(platform))
    graph, _ = nnx.split(Transformer(model.config, placement, rngs=None))
    changed: Transformer = nnx.merge(graph, nnx.state(model))
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_paged_form_equals_full_form(ours: Transformer, chunk: int, kernels: str) -> None:
    """64 positions, far past the windows of 5 and 7; three sequences of different lengths."""
    ids = tokens(3, ours.config.vocab_size)
    sequences = [ids[0].tolist(), ids[1, :50].tolist(), ids[2, :9].tolist()]
    whole = full(ours, jnp.asarray(ids))
    assert jnp.abs(whole).max() > 1
    model = with_kernels(ours, kernels)
    for i, logits in enumerate(paged_logits(model, sequences, chunk, page_size=4)):
        np.testing.assert_allclose(logits, whole[i, : len(sequences[i])], rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [300, 700])
def test_long_prompt_spans_query_and_key_blocks(chunk: int, kernels: str) -> None:
    """Several blocks of queries and of keys, windowed and not."""
    for kind in ("mistral", "llama"):
        ours = parity.random_model(kind)
        ids = np.random.default_rng(1).integers(0, 131, (1, 700), np.int32)
        (logits,) = paged_logits(
            with_kernels(ours, kernels), [ids[0].tolist()], chunk, page_size=16
        )
        np.testing.assert_allclose(logits, full(ours, jnp.asarray(ids))[0], rtol=0, atol=1e-4)


def test_padding_on_the_right_changes_nothing() -> None:
    ours = parity.random_model("mixtral")
    ids = jnp.asarray(tokens(1, 131))
    padded = jnp.pad(ids, ((0, 0), (0, 9)))
    np.testing.assert_allclose(full(ours, padded)[:, :LENGTH], full(ours, ids), rtol=0, atol=1e-5)


def test_bfloat16_is_near_float32() -> None:
    wide = parity.random_model("mistral")
    placement = Placement.of(wide.config, "bfloat16", mesh=None)
    graph, _ = nnx.split(Transformer(wide.config, placement, rngs=None))
    narrow = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(wide)))
    ids = jnp.asarray(tokens(1, 131))
    difference = jax.nn.log_softmax(full(narrow, ids)) - jax.nn.log_softmax(full(wide, ids))
    # eight bits of mantissa through three layers with logits of about 5
    assert jnp.abs(difference).mean() < 0.1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.ones(4, np.int32), r"of the shape \[4\]; give an array \[B T\]"),
        (np.ones((1, 0), np.int32), r"of the shape \[1, 0\]; give an array \[B T\]"),
        (np.ones((0, 4), np.int32), r"of the shape \[0, 4\]; give an array \[B T\]"),
        ([[1, 2]], r"the tokens are a list; give an array \[B T\]"),
    ],
)
def test_tokens_are_rows(ids: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = parity.random_model("mixtral")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        model(ids)


def test_every_parameter_carries_its_letters() -> None:
    named = named_parameters(parity.random_model("mixtral"))
    axes = {name: variable.get_metadata("axes") for name, variable in named.items()}
    assert axes["embed.weight"] == "VD"
    assert axes["layers.2.attention.o.weight"] == "DNH"
    assert axes["layers.0.feed_forward.down.weight"] == "EDF"
    assert all(axes.values())
