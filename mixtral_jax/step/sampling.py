"""Sampling: logits to tokens, a row for each sequence, all parameters as arrays.

The order is that of Hugging Face's `generate`:

    biases (forbidden ids are -inf) -> repetition penalty -> presence and frequency penalty
    -> a mask, where the row has one
    -> the likeliest token where temperature is 0, else
    temperature -> top_k -> top_p -> min_p -> a draw

A mask says which tokens a grammar, or the caller, lets follow, and it wins over all before it: a
row whose biases forbid every token of its mask draws among these by the model's own logits.

vLLM has the same order but for min_p, which it applies before top_k and top_p.

Logprobs are those of the model's own logits, before all of this.

The result of a row depends on the row alone, bit for bit, and never on its neighbours: the random
numbers come from its seed and position, and work that only a neighbour asked for leaves it
unchanged. Work that no row asked for is skipped: ordering a vocabulary costs more than a small
model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.axes import (
    FlatLogits,
    PackedDraws,
    RowBiases,
    RowBiasIds,
    RowFloats,
    RowHistory,
    RowMasks,
    Rows,
)
from mixtral_jax.sampling_params import MAX_TOP_LOGPROBS
from mixtral_jax.step.draws import NO_TOKEN, pack

NO_ID = 2**31 - 1  # pads ids: no vocabulary has it
_BLOCK = 256  # divides the vocabularies of all presets


class History(NamedTuple):
    """Tokens that penalties look back at; read only if some row has a penalty. All i32.

    The last input token is apart, because a pipelined engine has it on the device alone.
    """

    tokens: RowHistory  # S tokens of each row in order, without the last; padded with NO_ID
    last: Rows  # the last input token, at `position - 1`
    prompt_length: Rows  # tokens from this position on were generated


class Biases(NamedTuple):
    """Added to the logits of J tokens of each row; padded with NO_ID."""

    ids: RowBiasIds  # i32
    values: RowBiases  # f32; -inf forbids the token


class SamplingArrays(NamedTuple):
    """Parameters of R rows; f32, or i32 where a comment says so."""

    temperature: RowFloats  # 0 takes the likeliest token
    top_k: Rows  # i32; 0 keeps all
    top_p: RowFloats  # in [0, 1]; 1 keeps all
    min_p: RowFloats  # in [0, 1], of the likeliest token's probability; 0 keeps all
    presence_penalty: RowFloats  # 0 is none
    frequency_penalty: RowFloats  # 0 is none
    repetition_penalty: RowFloats  # > 0; 1 is none
    seed: Rows  # i32
    position: Rows  # i32, of the token to be drawn, in its sequence
    top_logprobs: (
        Rows  # i32; -1: no logprobs, 0: of the drawn token, up to 20: and of the likeliest
    )
    history: History
    biases: Biases

    @classmethod
    def greedy(cls, rows: int, *, history: int = 0, biases: int = 0) -> "SamplingArrays":
        """Returns rows that take the likeliest token and ask for nothing else.

        `history` and `biases` are the widths S and J.
        """

        def full(value: float) -> RowFloats:
            return jnp.full(rows, value, jnp.float32)

        zeros = jnp.zeros(rows, jnp.int32)
        return cls(
            temperature=full(0.0),
            top_k=zeros,
            top_p=full(1.0),
            min_p=full(0.0),
            presence_penalty=full(0.0),
            frequency_penalty=full(0.0),
            repetition_penalty=full(1.0),
            seed=zeros,
            position=zeros,
            top_logprobs=zeros - 1,
            history=History(
                tokens=jnp.full((rows, history), NO_ID, jnp.int32),
                last=jnp.full(rows, NO_ID, jnp.int32),
                prompt_length=zeros,
            ),
            biases=Biases(
                ids=jnp.full((rows, biases), NO_ID, jnp.int32),
                values=jnp.zeros((rows, biases), jnp.float32),
            ),
        )


class Sampled(NamedTuple):
    """Tokens for the next step, and everything for the host in one array."""

    tokens: Rows  # i32
    packed: PackedDraws  # see draws.py


def sample(logits: FlatLogits, params: SamplingArrays, allowed: RowMasks | None = None) -> Sampled:
    """Draws a token for each row of logits [R V] f32.

    Args:
        logits: the model's own.
        params: of each row.
        allowed: [R ceil(V / 32)] i32; bit i of word w is set if the row may draw the id 32 w + i.
            All ones, -1, let a row draw as it would without. None for no masks at all.
    """
    p = params
    if allowed is None:
        # On CPU a condition copies what it passes on, so rows that ask for nothing pass none.
        asks = jnp.any(_is_biased(logits, p) | _is_penalised(p) | (p.temperature > 0))
        tokens = jax.lax.cond(asks, _draw_scored, _likeliest, logits, p)
    else:
        tokens = _draw_or_likeliest(_mask(_scored(logits, p), logits, allowed), p)
    packed = jax.lax.cond(jnp.any(p.top_logprobs >= 0), _logprobs, _no_logprobs, logits, tokens, p)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    packed = packed.at[:, 0].set(jnp.where(jnp.isfinite(own), tokens, NO_TOKEN))
    return Sampled(tokens, packed)


def _as_is(logits: FlatLogits, params: SamplingArrays) -> FlatLogits:
    return logits


def _is_biased(logits: FlatLogits, params: SamplingArrays) -> jax.Array:
    return jnp.any(params.biases.ids < logits.shape[-1], axis=-1)


def _is_penalised(params: SamplingArrays) -> jax.Array:
    given = (params.presence_penalty != 0) | (params.frequency_penalty != 0)
    return given | (params.repetition_penalty != 1)


def _scored(logits: FlatLogits, params: SamplingArrays) -> FlatLogits:
    """Returns the logits with biases and penalties, each skipped if no row asks."""
    biased = jnp.any(_is_biased(logits, params))
    scores = jax.lax.cond(biased, _bias, _as_is, logits, params)
    return jax.lax.cond(jnp.any(_is_penalised(params)), _penalise, _as_is, scores, params)


def _draw_or_likeliest(scores: FlatLogits, params: SamplingArrays) -> Rows:
    return jax.lax.cond(jnp.any(params.temperature > 0), _draw, _likeliest, scores, params)


def _draw_scored(logits: FlatLogits, params: SamplingArrays) -> Rows:
    return _draw_or_likeliest(_scored(logits, params), params)


def _penalise(logits: FlatLogits, params: SamplingArrays) -> FlatLogits:
    """Repetition as Hugging Face (arXiv:1909.05858), presence and frequency as OpenAI."""
    tokens = jnp.concatenate([params.history.tokens, params.history.last[:, None]], axis=1)
    known = jnp.arange(tokens.shape[1] - 1, dtype=jnp.int32)
    position = jnp.concatenate(
        [jnp.broadcast_to(known, params.history.tokens.shape), params.position[:, None] - 1], axis=1
    )
    row = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    # A token that occurs twice is written twice, with the same value.
    score = jnp.take_along_axis(logits, tokens, axis=1, mode="clip")
    penalty = params.repetition_penalty[:, None]
    score = jnp.where(score < 0, score * penalty, score / penalty)
    logits = logits.at[row, tokens].set(score, mode="drop")

    generated = (position >= params.history.prompt_length[:, None]).astype(jnp.float32)
    count = jnp.zeros_like(logits).at[row, tokens].add(generated, mode="drop")
    presence = jnp.where(count > 0, params.presence_penalty[:, None], 0.0)
    return logits - params.frequency_penalty[:, None] * count - presence


def _bias(logits: FlatLogits, params: SamplingArrays) -> FlatLogits:
    row = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[row, params.biases.ids].add(params.biases.values, mode="drop")


def _mask(scores: FlatLogits, logits: FlatLogits, allowed: RowMasks) -> FlatLogits:
    """Returns the scores with -inf for each token that its row may not draw.

    A row whose scores are all -inf by that has its own logits in their place.
    """
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None]) & 1
    may_follow = bits.reshape(allowed.shape[0], -1)[:, : scores.shape[1]] == 1
    scores = jnp.where(may_follow, scores, -jnp.inf)
    is_masked = jnp.any(allowed != -1, axis=-1)
    is_empty = is_masked & (jnp.max(scores, axis=-1) == -jnp.inf)
    return jnp.where(is_empty[:, None], jnp.where(may_follow, logits, -jnp.inf), scores)


def _likeliest(logits: FlatLogits, params: SamplingArrays) -> Rows:
    """Returns the first of the largest logits' ids.

    The search goes by blocks, because a maximum is found faster than its place.
    """
    blocks = _blocks(logits, -jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1).astype(jnp.int32)
    inside = jnp.argmax(_block(blocks, block), axis=-1).astype(jnp.int32)
    return block * _BLOCK + inside


def _draw(logits: FlatLogits, params: SamplingArrays) -> Rows:
    """Returns the likeliest token where temperature is 0, elsewhere a draw from the tokens kept.

    The mass of a token is its probability divided by that of the likeliest token.
    """
    hot = params.temperature > 0
    temperature = jnp.where(hot, params.temperature, 1.0)[:, None]
    mass = jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature)
    mass = jax.lax.cond(jnp.any(params.top_k > 0), _keep_top_k, _as_is, mass, params)
    mass = jax.lax.cond(jnp.any(params.top_p < 1), _keep_top_p, _as_is, mass, params)
    mass = jax.lax.cond(jnp.any(params.min_p > 0), _keep_min_p, _as_is, mass, params)
    return jnp.where(hot, _sample_in_blocks(mass, params), _likeliest(logits, params))


def _keep_top_k(mass: FlatLogits, params: SamplingArrays) -> FlatLogits:
    """Keeps the likeliest k and those that equal the last of them (arXiv:1805.04833)."""
    threshold = _threshold(mass, jnp.ones_like(mass), params.top_k.astype(jnp.float32))
    threshold = jnp.where(params.top_k > 0, threshold, 0.0)
    return jnp.where(mass >= threshold[:, None], mass, 0.0)


def _keep_top_p(mass: FlatLogits, params: SamplingArrays) -> FlatLogits:
    """Keeps the likeliest tokens that together reach top_p of the whole (arXiv:1904.09751).

    Tokens as likely as the last of them are all kept, so that a row does not depend on the order of
    its tokens. transformers and vLLM keep as many as reach top_p: of ten equal tokens and 0.1 one.
    """
    threshold = _threshold(mass, mass, params.top_p * jnp.sum(mass, axis=-1))
    threshold = jnp.where(params.top_p < 1, threshold, 0.0)
    return jnp.where(mass >= threshold[:, None], mass, 0.0)


def _keep_min_p(mass: FlatLogits, params: SamplingArrays) -> FlatLogits:
    """Keeps those of at least min_p times the likeliest's probability (arXiv:2407.01082)."""
    threshold = params.min_p * jnp.max(mass, axis=-1)
    return jnp.where(mass >= threshold[:, None], mass, 0.0)


def _threshold(mass: FlatLogits, weight: FlatLogits, target: RowFloats) -> RowFloats:
    """Returns the largest mass from which upward the weights add up to the target, or 0.

    It is found by bisection over the bits of a float, which are ordered as the floats are where
    none is negative. That is exact, and no vocabulary is sorted.
    """

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        # Compared as floats, so that only one array is read: reading is the cost of a pass.
        kept = mass >= jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None]
        enough = jnp.sum(jnp.where(kept, weight, 0.0), axis=-1) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    largest = jax.lax.bitcast_convert_type(jnp.max(mass, axis=-1), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(largest), largest))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _sample_in_blocks(mass: FlatLogits, params: SamplingArrays) -> Rows:
    """Draws one token a row with a probability proportional to `mass` [R V].

    The argmax of log mass + Gumbel noise is such a draw (the Gumbel-max trick), and never of a mass
    of 0. It is done twice: for a block of ids, then for an id of that block. That needs V / 256 +
    256 random numbers a row instead of V, which would take fifty times as long.
    """
    blocks = _blocks(mass, 0.0)
    count = blocks.shape[1]

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, (count + _BLOCK,), jnp.float32)

    noise = jax.vmap(row)(params.seed, params.position)
    sums = jnp.sum(blocks, axis=-1)
    block = jnp.argmax(jnp.log(sums) + noise[:, :count], axis=-1).astype(jnp.int32)
    inside = jnp.argmax(jnp.log(_block(blocks, block)) + noise[:, count:], axis=-1)
    return block * _BLOCK + inside.astype(jnp.int32)


def _blocks(x: FlatLogits, fill: float) -> jax.Array:
    """Reshapes [R V] to [R blocks _BLOCK]; the last block is padded with `fill`."""
    missing = -x.shape[1] % _BLOCK
    x = jnp.pad(x, ((0, 0), (0, missing)), constant_values=fill)
    return x.reshape(x.shape[0], -1, _BLOCK)


def _block(blocks: jax.Array, block: Rows) -> jax.Array:
    """Returns each row's own block: [R _BLOCK]."""
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]


def _logprobs(logits: FlatLogits, tokens: Rows, params: SamplingArrays) -> PackedDraws:
    """Returns tokens and logprobs of the model's own distribution, packed for the host."""
    asked = params.top_logprobs
    own, ids, values = token_logprobs(logits, tokens, asked)
    return pack(tokens, jnp.where(asked[:, None] >= 0, own, 0.0), ids, values)


def token_logprobs(
    logits: FlatLogits, tokens: Rows, asked: Rows
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the logprobs of tokens and of the likeliest ones in their places.

    Args:
        logits: the model's own [R V] f32.
        tokens: ids [R] i32.
        asked: number of the likeliest tokens that are wanted of each row [R] i32.

    Returns:
        Logprobs of the tokens [R 1] f32; ids [R 20] i32 and logprobs [R 20] f32 of the likeliest
        tokens, zeros behind those that are wanted.
    """
    whole = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=1) - whole

    def no_top(logits: FlatLogits) -> tuple[jax.Array, jax.Array]:
        shape = (logits.shape[0], MAX_TOP_LOGPROBS)
        return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)

    values, ids = jax.lax.cond(jnp.any(asked > 0), top_logits, no_top, logits)
    wanted = jnp.arange(MAX_TOP_LOGPROBS, dtype=jnp.int32)[None] < asked[:, None]
    return own, jnp.where(wanted, ids, 0), jnp.where(wanted, values - whole, 0.0)


def top_logits(logits: FlatLogits) -> tuple[jax.Array, jax.Array]:
    """Returns the largest logits and their ids, [R 20] each; equal ones in order of id.

    They can only be in the 20 blocks whose maxima are largest.
    """
    blocks = _blocks(logits, -jnp.inf)
    few = min(MAX_TOP_LOGPROBS, blocks.shape[1])
    block = jnp.sort(jax.lax.top_k(jnp.max(blocks, axis=-1), few)[1], axis=-1)
    near = jnp.take_along_axis(blocks, block[:, :, None], axis=1).reshape(logits.shape[0], -1)
    values, place = jax.lax.top_k(near, MAX_TOP_LOGPROBS)
    ids = jnp.take_along_axis(block, place // _BLOCK, axis=1) * _BLOCK + place % _BLOCK
    return values, ids


def _no_logprobs(logits: FlatLogits, tokens: Rows, params: SamplingArrays) -> PackedDraws:
    rows = tokens.shape[0]
    top = jnp.zeros((rows, MAX_TOP_LOGPROBS), jnp.int32)
    return pack(tokens, jnp.zeros((rows, 1)), top, top.astype(jnp.float32))
