"""Distributions with probabilities that can be written down, and the processors of transformers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.step.draws import NO_TOKEN, unpack
from mixtral_jax.step.sampling import (
    NO_ID,
    Biases,
    History,
    Sampled,
    SamplingArrays,
    _bias,
    _keep_min_p,
    _keep_top_k,
    _keep_top_p,
    _penalise,
    _threshold,
    sample,
    top_logits,
)

# Probabilities 0.5, 0.3, 0.15, 0.05 at temperature 1.
LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
DRAWS = 4000

draw, penalise = jax.jit(sample), jax.jit(_penalise)


def arrays(rows: int, **values: Any) -> SamplingArrays:
    """Rows of the same parameters, or of a list of them."""
    base = SamplingArrays.greedy(rows)
    return base._replace(
        **{
            name: value
            if isinstance(value, tuple)
            else jnp.broadcast_to(jnp.asarray(value, getattr(base, name).dtype), rows)
            for name, value in values.items()
        }
    )


def history(*rows: list[int], last: list[int], prompt_length: list[int]) -> History:
    width = max(len(row) for row in rows) + 2
    padded = [row + [NO_ID] * (width - len(row)) for row in rows]
    return History(*(jnp.asarray(x, jnp.int32) for x in (padded, last, prompt_length)))


def biases(*rows: dict[int, float]) -> Biases:
    width = max(len(row) for row in rows) + 1
    ids = [[*row, *[NO_ID] * (width - len(row))] for row in rows]
    values = [[*row.values(), *[0.0] * (width - len(row))] for row in rows]
    return Biases(jnp.asarray(ids, jnp.int32), jnp.asarray(values, jnp.float32))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (dict(temperature=0.0), [1, 0, 0, 0]),
        (dict(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        # 0.5 < 0.6, so the second token still belongs; 0.8 >= 0.6, so the third does not.
        (dict(temperature=1.0, top_p=0.6), [0.625, 0.375, 0, 0]),
        (dict(temperature=1.0, top_p=0.49), [1, 0, 0, 0]),
        (dict(temperature=1.0, top_p=0.0), [1, 0, 0, 0]),
        # temperature 0.5 squares the probabilities: 0.25 : 0.09 : 0.0225 : 0.0025
        (dict(temperature=0.5), [0.685, 0.247, 0.062, 0.007]),
        (dict(temperature=1.0, top_k=1), [1, 0, 0, 0]),
        (dict(temperature=1.0, top_k=3), [0.526, 0.316, 0.158, 0]),
        (dict(temperature=1.0, top_k=99), [0.5, 0.3, 0.15, 0.05]),
        # 0.6 of the three that top_k keeps: 0.526 < 0.6, so two of them.
        (dict(temperature=1.0, top_k=3, top_p=0.6), [0.625, 0.375, 0, 0]),
        # at least 0.2 * 0.5
        (dict(temperature=1.0, min_p=0.2), [0.526, 0.316, 0.158, 0]),
        (dict(temperature=1.0, min_p=1.0), [1, 0, 0, 0]),
        # After temperature: 0.2 * 0.25 > 0.0225.
        (dict(temperature=0.5, min_p=0.2), [0.735, 0.265, 0, 0]),
    ],
)
def test_frequencies(values: dict[str, float], expected: list[float]) -> None:
    rows = arrays(DRAWS, seed=np.arange(DRAWS), **values)
    drawn = draw(jnp.tile(jnp.asarray(LOGITS), (DRAWS, 1)), rows).tokens
    # three standard deviations of 4000 draws at p = 0.5
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / DRAWS, expected, atol=0.024)


def test_frequencies_over_several_blocks() -> None:
    """Chi-square of 20000 draws from 600 tokens, a third of which cannot occur."""
    logits = np.random.default_rng(0).normal(size=600).astype(np.float32)
    logits[::3] = -np.inf
    rows = arrays(20_000, temperature=1.0, seed=7, position=np.arange(20_000))
    drawn = draw(jnp.tile(jnp.asarray(logits), (20_000, 1)), rows).tokens
    seen = np.bincount(drawn, minlength=600)
    assert not seen[::3].any()
    want = 20_000 * np.exp(logits) / np.exp(logits).sum()
    possible = want > 0
    chi_square = np.sum((seen - want)[possible] ** 2 / want[possible])
    # 399 degrees of freedom: mean 399, standard deviation sqrt(2 * 399) = 28
    assert abs(chi_square - 399) < 4 * 28


def test_penalties_by_hand() -> None:
    """Two rows of the same tokens 0 0 1, 1 and 3; in the second all belong to the prompt."""
    rows = arrays(
        2,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        position=4,
        history=history([0, 0, 1], [0, 0, 1], last=[3, 3], prompt_length=[1, 4]),
    )
    logits = jnp.asarray([[4.0, -1.0, 3.0, 1.0]] * 2)
    # Generated in the first row: 0 once, 1 once, 3 once (the last token).
    np.testing.assert_array_equal(
        penalise(logits, rows),
        [[2 - 0.75, -2 - 0.75, 3.0, 0.5 - 0.75], [2.0, -2.0, 3.0, 0.5]],
    )
    rows = arrays(
        1,
        frequency_penalty=-0.25,
        position=6,
        history=history([2, 0, 0, 0, 1], last=[0], prompt_length=[1]),
    )
    np.testing.assert_array_equal(penalise(logits[:1], rows), [[4 + 1, -1 + 0.25, 3.0, 1.0]])


def test_biases_by_hand() -> None:
    rows = arrays(2, biases=biases({2: 1.5, 0: -np.inf}, {}))
    logits = jnp.asarray([[4.0, 1.0, 3.0]] * 2)
    np.testing.assert_array_equal(_bias(logits, rows), [[-np.inf, 1.0, 4.5], [4.0, 1.0, 3.0]])
    assert draw(logits, rows).tokens.tolist() == [2, 0]


def test_biases_come_before_penalties() -> None:
    """Token 0 was seen: (2 + 6) / 2 is less than 5. The other order would give 2 / 2 + 6 = 7."""
    rows = arrays(
        1,
        repetition_penalty=2.0,
        position=1,
        history=history([], last=[0], prompt_length=[1]),
        biases=biases({0: 6.0}),
    )
    assert draw(jnp.asarray([[2.0, 5.0, 0.0]]), rows).tokens.tolist() == [1]


def test_penalties_leave_forbidden_tokens_forbidden() -> None:
    """Token 0 was seen; a reward, a subtraction and a division of minus infinity are infinite."""
    rows = arrays(
        1,
        repetition_penalty=0.01,
        presence_penalty=-2.0,
        frequency_penalty=-2.0,
        position=2,
        history=history([0], last=[0], prompt_length=[0]),
        biases=biases({0: -np.inf}),
    )
    logits = jnp.asarray([[30.0, 1.0, 0.0]])
    scores = penalise(_bias(logits, rows), rows)
    np.testing.assert_array_equal(scores, [[-np.inf, 1.0, 0.0]])
    assert draw(logits, rows).tokens.tolist() == [1]


def test_what_was_forbidden_is_never_drawn() -> None:
    rows = arrays(500, temperature=2.0, seed=np.arange(500), biases=biases(*[{0: -np.inf}] * 500))
    drawn = draw(jnp.asarray([[30.0, 0.0, 0.0]] * 500), rows).tokens
    assert set(drawn.tolist()) == {1, 2}


def masks(*rows: set[int] | None, vocab: int) -> np.ndarray:
    """A mask for each row that allows these ids; None for all."""
    bits = np.zeros((len(rows), -(-vocab // 32) * 32), np.uint8)
    for row, ids in enumerate(rows):
        bits[row, slice(None) if ids is None else list(ids)] = 1
    return np.packbits(bits, axis=1, bitorder="little").view(np.int32)


draw_masked = jax.jit(sample)


def test_masked_rows_by_hand() -> None:
    """Of 70 ids, in three words, each row draws the likeliest that is allowed: id 69 is likelier
    than 68, and so on. Biases and penalties act within the mask; where they leave nothing, the mask
    wins, and the likeliest of it by the model itself is drawn."""
    vocab = 70
    logits = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.float32), (8, vocab))
    allowed = masks(None, {0}, {3, 31}, {32, 5}, {64, 63}, {7, 9}, {7, 9}, {7, 9}, vocab=vocab)
    minus = -np.inf
    params = arrays(
        8,
        top_logprobs=0,
        biases=biases({}, {0: minus}, {}, {}, {}, {9: minus}, {7: minus, 9: minus}, {7: 5.0}),
    )
    draws = unpack(np.asarray(draw_masked(logits, params, allowed).packed))
    assert draws.tokens.tolist() == [69, 0, 31, 32, 64, 7, 9, 7]
    whole = jax.nn.logsumexp(logits, axis=-1)  # logprobs are those of the raw logits
    expected = draws.tokens - np.asarray(whole)
    np.testing.assert_allclose(draws.logprobs, expected, rtol=1e-5, atol=1e-5)


def test_a_masked_draw_is_among_the_allowed_and_others_keep_their_bits() -> None:
    """Rows without a mask draw what they draw without masks beside them, also where a row has
    top_k, top_p and penalties; those with one never leave it, at any temperature."""
    vocab, rows = 600, 64
    logits = jax.random.normal(jax.random.key(1), (rows, vocab)) * 3
    params = arrays(
        rows,
        temperature=[0.0, 0.7, 1.5, 30.0] * 16,
        top_k=[0, 5] * 32,
        top_p=[1.0, 0.9, 0.5] * 21 + [1.0],
        seed=[*range(rows)],
        position=[*range(rows)],
        top_logprobs=3,
    )
    some = {1, 40, 299, 300, 511, 512, 599}
    allowed = masks(*[some if i % 3 else None for i in range(rows)], vocab=vocab)
    masked, plain = draw_masked(logits, params, allowed), draw(logits, params)
    tokens = np.asarray(masked.tokens)
    for row in range(rows):
        if row % 3:
            assert tokens[row] in some
        else:
            assert (np.asarray(masked.packed)[row] == np.asarray(plain.packed)[row]).all()
    assert {*tokens.tolist()} >= some


def test_logprobs_are_of_the_raw_logits() -> None:
    torch = pytest.importorskip("torch", reason="no torch for this Python: see the test extra")
    logits = np.random.default_rng(3).normal(size=(4, 700)).astype(np.float32) * 5
    rows = arrays(
        4,
        temperature=[1.5, 1.5, 0.0, 1.5],
        top_k=40,
        top_logprobs=[20, 0, 3, -1],
        biases=biases({5: 9.0}, {6: 9.0}, {7: 50.0}, {}),
    )
    sampled = draw(jnp.asarray(logits), rows)
    draws = unpack(np.asarray(sampled.packed))
    np.testing.assert_array_equal(draws.tokens, sampled.tokens)
    assert draws.tokens[2] == 7
    want = torch.log_softmax(torch.tensor(logits), -1)
    own = want.numpy()[np.arange(4), draws.tokens]
    np.testing.assert_allclose(draws.logprobs[:3], own[:3], atol=1e-4)
    values, ids = want.topk(20)
    for row, count in enumerate([20, 0, 3, 0]):
        np.testing.assert_array_equal(draws.top_ids[row, :count], ids[row, :count])
        np.testing.assert_allclose(draws.top_logprobs[row, :count], values[row, :count], atol=1e-4)
        assert not draws.top_ids[row, count:].any()
        assert not draws.top_logprobs[row, count:].any()
    assert draws.logprobs[3] == 0


def test_logprobs_of_a_small_vocabulary() -> None:
    draws = unpack(np.asarray(draw(jnp.asarray([LOGITS]), arrays(1, top_logprobs=6)).packed))
    np.testing.assert_allclose(np.exp(draws.logprobs), [0.5], atol=1e-6)
    np.testing.assert_array_equal(draws.top_ids[0, :4], range(4))
    np.testing.assert_allclose(
        np.exp(draws.top_logprobs[0, :7]), [0.5, 0.3, 0.15, 0.05, 0, 0, 1], atol=1e-6
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_logprobs", [-1, 2])
def test_no_token_follows_from_logits_that_are_not_finite(
    temperature: float, top_logprobs: int
) -> None:
    logits = np.tile(np.float32(LOGITS), (2, 1))
    logits[0] = np.nan
    rows = arrays(2, temperature=temperature, top_logprobs=top_logprobs)
    alone = draw(jnp.asarray(logits[1:]), arrays(1, temperature=temperature))
    sampled = draw(jnp.asarray(logits), rows)
    tokens = unpack(np.asarray(sampled.packed)).tokens
    assert tokens.tolist() == [NO_TOKEN, sampled.tokens[1]]
    assert temperature > 0 or tokens[1] == alone.tokens[0]


def test_top_equals_the_library_with_ties() -> None:
    logits = np.round(np.random.default_rng(4).normal(size=(20, 9000)) * 2).astype(np.float32)
    values, ids = jax.lax.top_k(jnp.asarray(logits), 20)
    ours = jax.jit(top_logits)(jnp.asarray(logits))
    np.testing.assert_array_equal(ours[0], values)
    np.testing.assert_array_equal(ours[1], ids)
    assert draw(jnp.asarray(logits), arrays(20)).tokens.tolist() == ids[:, 0].tolist()


def test_threshold_equals_sorting() -> None:
    """The textbook form, with a sort, on random rows; ties included."""
    dice = np.random.default_rng(1)
    scaled = np.round(dice.normal(size=(200, 64)) * 3, 1).astype(np.float32)
    top_p = dice.uniform(0, 1, 200).astype(np.float32)
    probability = np.asarray(jax.nn.softmax(jnp.asarray(scaled)))
    mass = jnp.asarray(probability)
    found = np.asarray(jax.jit(_threshold)(mass, mass, jnp.asarray(top_p)))
    for row in range(200):
        ordered = np.sort(probability[row])[::-1]
        count = int(np.searchsorted(np.cumsum(ordered), top_p[row])) + 1
        assert found[row] == ordered[count - 1]


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_kept_tokens_equal_transformers(temperature: float) -> None:
    torch = pytest.importorskip("torch", reason="no torch for this Python: see the test extra")
    import transformers

    dice = np.random.default_rng(5)
    logits = dice.normal(size=(50, 700)).astype(np.float32) * 3
    scaled = transformers.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    mass = jnp.exp((logits - logits.max(axis=-1, keepdims=True)) / np.float32(temperature))
    for top_k, top_p, min_p in [(40, 0.9, 0.05), (5, 0.7, 0.0), (0, 0.95, 0.1), (300, 1.0, 0.01)]:
        theirs, ours = scaled, mass
        rows = arrays(50, top_k=top_k, top_p=top_p, min_p=min_p)
        if top_k:
            theirs = transformers.TopKLogitsWarper(top_k)(None, theirs)
        theirs = transformers.TopPLogitsWarper(top_p)(None, theirs)
        theirs = transformers.MinPLogitsWarper(min_p)(None, theirs)
        for keep in (_keep_top_k, _keep_top_p, _keep_min_p):
            ours = keep(ours, rows)
        kept = np.isfinite(theirs.numpy())
        np.testing.assert_array_equal(np.asarray(ours) > 0, kept)
        share = np.asarray(ours / ours.sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(share, theirs.softmax(-1).numpy(), atol=1e-6)


def test_repetition_penalty_equals_transformers() -> None:
    torch = pytest.importorskip("torch", reason="no torch for this Python: see the test extra")
    import transformers

    dice = np.random.default_rng(6)
    logits = dice.normal(size=(8, 300)).astype(np.float32)
    ids = dice.integers(0, 300, (8, 40))
    rows = arrays(
        8,
        repetition_penalty=1.3,
        position=40,
        history=history(*ids[:, :-1].tolist(), last=ids[:, -1].tolist(), prompt_length=[9] * 8),
    )
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.3)(
        torch.tensor(ids), torch.tensor(logits)
    )
    np.testing.assert_allclose(penalise(jnp.asarray(logits), rows), theirs.numpy(), rtol=1e-6)


def rows_of_all_kinds() -> SamplingArrays:
    """Row 0 asks for everything, the others for a part each."""
    return arrays(
        8,
        temperature=[0.7, 0, 1, 1, 1, 1, 0, 0],
        top_k=[30, 0, 0, 20, 0, 0, 0, 0],
        top_p=[0.9, 1, 1, 1, 0.8, 1, 1, 1],
        min_p=[0.02, 0, 0, 0, 0, 0.1, 0, 0],
        presence_penalty=[0.3, 0, 0, 0, 0, 0, 0, 0.7],
        frequency_penalty=[0.2, 0, 0, 0, 0, 0, 0, 0],
        repetition_penalty=[1.2, 1, 1, 1, 1, 1, 1.4, 1],
        seed=[5, 0, 6, 7, 8, 9, 0, 0],
        position=[4, 2, 3, 2, 2, 9, 6, 4],
        top_logprobs=[20, 5, -1, -1, 0, -1, -1, 3],
        history=history(
            [4, 5, 6], [1], [1, 2], [3], [3], [9] * 8, [5] * 5, [3, 2, 1],
            last=[7, 1, 2, 3, 4, 5, 6, 7],
            prompt_length=[2, 1, 1, 1, 1, 1, 2, 2],
        ),
        biases=biases({3: 2.0, 9: -np.inf}, {}, {}, {8: 4.0}, {}, {}, {}, {}),
    )  # fmt: skip


@pytest.mark.parametrize("vocab", [300, 49_152])
def test_a_row_gets_the_same_whatever_it_stands_beside(vocab: int) -> None:
    """Bit for bit; the neighbours ask for everything there is."""
    # Few values of many tokens, as after a product in bfloat16: ties everywhere.
    logits = np.random.default_rng(0).normal(size=(8, vocab)).astype(jnp.bfloat16) * 3
    rows = rows_of_all_kinds()

    def among(places: list[int]) -> Sampled:
        chosen = jax.tree.map(lambda x: x[np.asarray(places)], rows)
        return draw(jnp.asarray(logits[places].astype(np.float32)), chosen)

    whole = among([*range(8)])
    assert (whole.packed[:, 0] == whole.tokens).all()
    for place in range(8):
        np.testing.assert_array_equal(among([place]).packed[0], whole.packed[place])
    np.testing.assert_array_equal(among([*range(7, -1, -1)])[1], whole.packed[::-1])


def test_scores_of_rows_that_did_not_ask_stay_as_they_are() -> None:
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(8, 300)).astype(np.float32))
    logits = logits.at[:, 7].set(-jnp.inf).at[:, 8].set(-0.0)
    rows = rows_of_all_kinds()
    plain = slice(1, 6)  # no penalties
    np.testing.assert_array_equal(
        np.asarray(penalise(logits, rows))[plain].view(np.int32),
        np.asarray(logits)[plain].view(np.int32),
    )
    mass = jnp.exp(logits)
    for keep, asks in [(_keep_top_k, [0, 3]), (_keep_top_p, [0, 4]), (_keep_min_p, [0, 5])]:
        rest = np.delete(np.arange(8), asks)
        np.testing.assert_array_equal(jax.jit(keep)(mass, rows)[rest], mass[rest])


def test_the_draw_follows_seed_and_position_alone() -> None:
    logits = jnp.zeros((200, 50))
    at = np.arange(200)

    def drawn(**values: Any) -> list[int]:
        return draw(logits, arrays(200, temperature=1.0, **values)).tokens.tolist()

    assert drawn(seed=3, position=9) == drawn(seed=3, position=9)
    assert len(set(drawn(seed=3, position=9))) == 1
    assert len(set(drawn(seed=3, position=at))) > 40
    assert len(set(drawn(seed=at, position=9))) > 40


def test_it_compiles_once() -> None:
    traced = []

    @jax.jit
    def counted(logits: jax.Array, params: SamplingArrays) -> Sampled:
        traced.append(1)
        return sample(logits, params)

    logits, rows = jnp.zeros((8, 300)), rows_of_all_kinds()
    for values in [{}, dict(temperature=0.7), dict(top_logprobs=5), dict(top_k=3, temperature=1)]:
        counted(logits, arrays(8, **values, history=rows.history, biases=rows.biases))
    counted(logits, rows)
    assert len(traced) == 1
